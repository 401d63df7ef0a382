"""Compiling in another process: what goes there, what comes back, and what can go wrong."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvmtrace.errors import KvmtraceError
from kvmtrace.sources.bpf import compiler
from kvmtrace.sources.bpf.compiler import CompiledProgram, CompiledPrograms, MapDefinition

COMPILED = CompiledPrograms(
    "0.31.0",
    {"exits": MapDefinition(1, 72, 48, 16384, 0), "ring": MapDefinition(27, 0, 0, 4096, 0)},
    {
        "fn_run": CompiledProgram(bytes(range(32)), ((8, "exits"), (16, "ring"))),
        "tp_run": CompiledProgram(b"\x95" + bytes(7), ()),
    },
)


def python(directory: Path, script: str) -> str:
    """Something to run in the place of Python."""
    path = directory / "python"
    path.write_text(
        f"#!{sys.executable}\nimport json, sys\nasked = json.load(sys.stdin)\n{script}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_programs_as_json() -> None:
    assert CompiledPrograms.from_object(json.loads(json.dumps(COMPILED.as_object()))) == COMPILED


@pytest.mark.parametrize(
    "change",
    [
        {"maps": {}},
        {"programs": {"x": {"code": "AAAA", "maps": []}}},
        {"programs": {"x": {"code": "", "maps": []}}},
        {"programs": {"x": {"code": "AAAAAAAAAAA=", "maps": [[0, "exits"]]}}},
        {"programs": {"x": {"code": "@", "maps": []}}},
        {"programs": []},
        {"maps": {"exits": {"type": 1}}},
        {"bcc": None, "maps": None},
    ],
)
def test_what_are_no_programs(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="these are no compiled programs"):
        CompiledPrograms.from_object({**COMPILED.as_object(), **change})


def test_the_request_and_the_answer(tmp_path: Path) -> None:
    answer = json.dumps(COMPILED.as_object())
    script = f"""
assert asked["cflags"][1:] == ["-g0", "-DX=1"] and asked["cflags"][0].startswith("-I")
assert '#line 1 "lookup.bpf.c"' in asked["text"] and asked["stubs"].endswith("/stubs")
print({answer!r})"""
    assert compiler.compiled(["-DX=1"], python(tmp_path, script)) == COMPILED


@pytest.mark.parametrize(
    ("script", "message", "detail"),
    [
        (
            "print(json.dumps({'error': ['bcc is not installed', 'apt install it', '']}))",
            "bcc is not installed",
            "",
        ),
        ("sys.exit('Segmentation fault')", "bcc cannot compile", "Segmentation fault"),
        ("print('{}')", "bcc cannot compile", "it ended with 0"),
        ("print('[1]')", "bcc cannot compile", "it ended with 0"),
        ("print('nonsense')", "bcc cannot compile", "it ended with 0"),
    ],
)
def test_what_goes_wrong_there(tmp_path: Path, script: str, message: str, detail: str) -> None:
    with pytest.raises(KvmtraceError, match=message) as raised:
        compiler.compiled([], python(tmp_path, script))
    assert raised.value.detail == detail
    assert raised.value.hint


def test_nothing_to_run(tmp_path: Path) -> None:
    with pytest.raises(KvmtraceError, match="bcc cannot compile") as raised:
        compiler.compiled([], str(tmp_path / "none"))
    assert os.strerror(2) in raised.value.detail


def test_a_compiler_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "TIMEOUT", 0.5)
    with pytest.raises(KvmtraceError, match="bcc cannot compile"):
        compiler.compiled([], python(tmp_path, "import time; time.sleep(100)"))


def test_without_bcc_the_real_one_names_the_package(tmp_path: Path) -> None:
    """Here bcc is out of sight, as it is in any virtual environment of its own."""
    code = "from kvmtrace.sources.bpf.compiler import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input='{"text": "", "cflags": [], "stubs": ""}',
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    if "error" in answer:
        message, hint, _ = answer["error"]
        assert "bcc" in message or "BPF" in message
        assert hint


def test_the_version_is_read_without_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "bcc"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('this must not be run')\n")
    (package / "version.py").write_text("__version__ = '0.31.0'\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert compiler.bcc_version() == "0.31.0"
    (package / "version.py").unlink()
    assert compiler.bcc_version() is None


def test_what_programs_follow_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiler.fingerprint(["-DA=1"])
    assert first == compiler.fingerprint(["-DA=1"])
    assert first != compiler.fingerprint(["-DA=2"])
    release = os.uname_result(("Linux", "host", "7.3.4", "#1 SMP", "x86_64"))
    monkeypatch.setattr(os, "uname", lambda: release)
    other = compiler.fingerprint(["-DA=1"])
    assert other != first
    for part in (*compiler.PARTS, "record.h"):
        (tmp_path / part).write_text(part)
    monkeypatch.setattr(compiler, "bpf_dir", lambda: tmp_path)
    before = compiler.fingerprint(["-DA=1"])
    (tmp_path / "record.h").write_text("changed")
    assert before not in (other, compiler.fingerprint(["-DA=1"]))
