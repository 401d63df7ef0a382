"""What is kept for the next start, and who is believed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmtrace.sources.bpf import program_cache
from kvmtrace.sources.bpf.program_cache import ProgramCache

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")


def cache(path: Path) -> ProgramCache:
    return ProgramCache(str(path), os.geteuid())


def test_what_was_written_is_read(tmp_path: Path) -> None:
    first = cache(tmp_path / "kept")
    assert first.read("one") is None
    assert first.write("one", {"a": [1, None]})
    assert (first.read("one"), first.trouble) == ({"a": [1, None]}, None)
    assert first.write("one", 2)
    assert cache(tmp_path / "kept").read("one") == 2
    assert os.stat(tmp_path / "kept").st_mode & 0o777 == 0o755
    assert os.stat(tmp_path / "kept" / "one").st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path / "kept") == ["one"]


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _change(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"whole", b"wrong"))


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _open_to_all(file: Path) -> None:
    file.chmod(0o666)


def _open_to_a_group(file: Path) -> None:
    file.chmod(0o660)


def _directory_open_to_all(file: Path) -> None:
    file.parent.chmod(0o777)


def _link(file: Path) -> None:
    os.rename(file, file.parent / "elsewhere")
    file.symlink_to("elsewhere")


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _foreign(file: Path) -> None:
    os.chown(file, 1234, 1234)


def _directory_foreign(file: Path) -> None:
    os.chown(file.parent, 1234, 1234)


def _directory_above_foreign(file: Path) -> None:
    os.chown(file.parent.parent, 1234, 1234)


@pytest.mark.parametrize(
    "harm",
    [
        *(
            _truncate,
            _change,
            _empty,
            _open_to_all,
            _open_to_a_group,
            _directory_open_to_all,
            _link,
        ),
        *(pytest.param(one, marks=ROOT) for one in (_foreign, _directory_foreign)),
        pytest.param(_directory_above_foreign, marks=ROOT),
    ],
)
def test_what_is_not_believed_is_said(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    place = tmp_path / "above" / "kept"
    place.parent.mkdir()
    assert cache(place).write("one", "whole")
    harm(place / "one")
    second = cache(place)
    assert second.read("one") is None
    assert second.trouble
    assert str(place) in second.trouble


def test_a_pipe_in_its_place_is_not_waited_for(tmp_path: Path) -> None:
    kept = cache(tmp_path / "kept")
    assert kept.write("one", "whole")
    _fifo(tmp_path / "kept" / "one")
    assert kept.read("one") is None
    assert kept.trouble


def test_what_is_damaged_is_made_anew(tmp_path: Path) -> None:
    kept = cache(tmp_path / "kept")
    assert kept.write("one", "whole")
    _truncate(tmp_path / "kept" / "one")
    assert kept.read("one") is None
    assert kept.write("one", "whole")
    assert cache(tmp_path / "kept").read("one") == "whole"


def test_a_link_of_roots_leads_to_what_is_judged(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o755)
    (tmp_path / "kept").symlink_to("disk")
    kept = cache(tmp_path / "kept")
    assert kept.write("one", 1)
    assert kept.path == str(tmp_path / "disk")
    (tmp_path / "disk").chmod(0o777)
    assert cache(tmp_path / "kept").read("one") is None


def test_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = cache(tmp_path / "none" / "kept")
    assert not missing.write("one", 1)
    assert missing.trouble == f"{tmp_path}/none/kept cannot be made: {os.strerror(2)}"
    (tmp_path / "file").write_text("")
    file = cache(tmp_path / "file")
    assert not file.write("one", 1)
    assert file.read("one") is None
    assert file.trouble
    monkeypatch.setenv(program_cache.VARIABLE, "")
    nowhere = ProgramCache()
    assert (nowhere.read("one"), nowhere.write("one", 1), nowhere.path) == (None, False, "")
    assert nowhere.trouble


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = cache(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "rename", full)
    assert not kept.write("one", 1)
    assert kept.trouble == f"{tmp_path}: {os.strerror(28)}"
    assert os.listdir(tmp_path) == []


def test_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_cache, "MAX_FILES", 3)
    kept = cache(tmp_path)
    for number in range(5):
        assert kept.write(str(number), number)
        os.utime(tmp_path / str(number), (number, number))
    assert kept.write("last", 5)
    assert sorted(os.listdir(tmp_path)) == ["3", "4", "last"]
