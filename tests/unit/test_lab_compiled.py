"""What a machine of the lab compiled, kept for those that would compile the same."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tests.lab import compiled
from tests.lab.compiled import Compiled, program_sources
from tests.unit.test_imports import MAY_IMPORT, VOCABULARY


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("bpf/vms.c", "bpf/stubs/arch/page.h", "kvmtrace/views/table.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(compiled, "PROJECT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["bpf/vms.c", "bpf/stubs/arch/page.h"])
def test_programs_follow_from_each_file_in_c(tree: Path, name: str) -> None:
    before = program_sources()
    (tree / name).write_text("changed")
    assert program_sources() != before


@pytest.mark.parametrize("layer", ["sources", *MAY_IMPORT["sources"]])
def test_programs_follow_from_all_that_sources_may_import(tree: Path, layer: str) -> None:
    before = program_sources()
    package = tree / "kvmtrace" / ("" if layer == VOCABULARY else f"{layer}/below")
    package.mkdir(parents=True, exist_ok=True)
    (package / "new.py").write_text("")
    assert program_sources() != before


def test_programs_do_not_follow_from_what_is_above_the_sources(tree: Path) -> None:
    before = program_sources()
    (tree / "kvmtrace/views/table.py").write_text("changed")
    assert program_sources() == before


def archive(**files: bytes) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as into:
        for name, content in files.items():
            member = tarfile.TarInfo(f"/var/{name}")
            member.size = len(content)
            into.addfile(member, io.BytesIO(content))
    return written.getvalue()


def test_what_was_kept_is_of_the_same_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMTRACE_LAB_CACHE", str(tmp_path))
    commands = ("true", "find /var -print0")
    one = Compiled("programs", commands, "root", "kernel")
    assert one.files is None
    one.keep(archive(a=b"first", b=b""))
    assert Compiled("programs", commands, "root", "kernel").files == {
        "var/a": b"first",
        "var/b": b"",
    }
    assert Compiled("programs", commands, "root", "other").files is None


def test_what_is_cut_off_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMTRACE_LAB_CACHE", str(tmp_path))
    one = Compiled("programs", ("true", "true"))
    with pytest.raises(tarfile.TarError):
        one.keep(archive(a=b"x" * 2000)[:1000])
    assert one.files is None
