"""The lab accepts expired release files of a frozen mirror, but not a wrong clock."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.lab import mirror, programs
from tests.lab.errors import LabError

SAID = "E: Release file for http://deb.example/InRelease is {}. Updates ... will not be applied."


@pytest.mark.parametrize(
    ("why", "tries"),
    [
        ("expired (invalid since 3d 2h)", 2),
        ("not valid yet (invalid for another 2h)", 1),
        ("no longer signed", 1),
    ],
)
def test_only_an_expired_release_file_is_taken_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str, tries: int
) -> None:
    sources: list[str] = []
    suite = mirror.Suite("trixie", "amd64")

    def apt(command: Sequence[str]) -> str:
        sources.append((tmp_path / "sources.list").read_text())
        raise LabError(SAID.format(why))

    monkeypatch.setattr(mirror, "uri", lambda: "http://deb.example")
    monkeypatch.setattr(programs, "output", lambda command, **how: apt(command))
    monkeypatch.setattr(suite, "_configure", (tmp_path / "sources.list").write_text)
    with pytest.raises(LabError, match="Release file"):
        suite._fetch_lists(suite.source())
    assert [("check-valid-until=no" in source) for source in sources] == [False, True][:tries]
