"""The programs' names, from which follows what attaches them; compiled ones are kept."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmtrace import probes
from kvmtrace.errors import KvmtraceError
from kvmtrace.linux.btf import FunctionType
from kvmtrace.sources.bpf import program_cache, programs
from kvmtrace.sources.bpf.compiler import PARTS, CompiledPrograms, bpf_dir, joined
from kvmtrace.sources.bpf.program_cache import ProgramCache
from kvmtrace.sources.bpf.programs import Kept
from tests.unit.test_bpf_compiler import COMPILED

TEXT = joined()
NAMES = frozenset(re.findall(r"^int ((?:tp|te|kp|kr)_\w+)\(", TEXT, re.MULTILINE))
SPECS = {
    spec.name: spec
    for spec in (*probes.specs("x86_64"), *probes.specs("aarch64"), *probes.context_specs())
}


@pytest.mark.parametrize("name", SPECS)
def test_a_probe_has_its_program(name: str) -> None:
    if name in programs._IN_RUN:
        assert f"FN_{name}" not in TEXT
    elif name == "run":
        assert {"tp_run", "te_run"} <= NAMES
    elif SPECS[name].is_tracepoint:
        assert f"tp_{name}" in NAMES
    else:
        assert f"\n#ifdef FN_{name}\nint FN_{name}(" in TEXT


def test_a_program_belongs_to_a_probe() -> None:
    for name in NAMES - {"tp_run", "te_run"}:
        way, _, probe = name.partition("_")
        assert (way == "tp") == SPECS[probe].is_tracepoint
        assert way != "kr" or (SPECS[probe].at == "return" and f"kp_{probe}" in NAMES)


@pytest.mark.parametrize("name", [s.name for s in SPECS.values() if not s.is_tracepoint])
def test_a_kprobe_sees_what_its_probe_is_for(name: str) -> None:
    """A probe at the return has a kretprobe."""
    if f"kp_{name}" in NAMES:
        assert (f"kr_{name}" in NAMES) == (SPECS[name].at == "return")


def test_errors_name_the_part() -> None:
    for part in PARTS:
        first = (bpf_dir() / part).read_text().partition("\n")[0]
        assert f'#line 1 "{part}"\n{first}\n' in TEXT


# -- kept for the next start


class Compiler:
    """Counts how often it is asked."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        self.version: str | None = COMPILED.bcc
        self.path = tmp_path / "kept"
        layout = SimpleNamespace(cflags=lambda *, kprobes: ["-DX=1", f"-DKP={kprobes}"])
        self.trampolines = True
        self.kprobes: list[bool] = []
        monkeypatch.setattr(programs, "_layout", lambda _cache: layout)
        monkeypatch.setattr(programs, "_has_trampolines", lambda _layout: self.trampolines)
        monkeypatch.setattr(programs, "compiled", self.compiled)
        monkeypatch.setattr(programs, "bcc_version", lambda: self.version)
        monkeypatch.setenv(program_cache.VARIABLE, str(self.path))
        if os.geteuid():
            monkeypatch.setattr(ProgramCache.__init__, "__defaults__", (None, os.geteuid()))

    def compiled(self, cflags: list[str]) -> CompiledPrograms:
        assert "-DX=1" in cflags
        self.times += 1
        self.kprobes.append("-DKP=True" in cflags)
        if self.version is None:
            raise KvmtraceError("bcc is not installed", "apt install it")
        return replace(COMPILED, bcc=self.version)

    def start(self) -> str | None:
        """As a source does; what was wrong with the cache."""
        cache = ProgramCache()
        made = programs._compiled(programs._layout(cache), cache)
        assert made.programs == COMPILED.programs
        return cache.trouble


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(tmp_path, monkeypatch)


def test_the_second_start_compiles_nothing(compiler: Compiler) -> None:
    assert programs.kept() == Kept(str(compiler.path), None, None)
    assert (compiler.start(), compiler.start(), compiler.times) == (None, None, 1)
    assert programs.kept() == Kept(str(compiler.path), COMPILED.bcc, None)


def test_another_bcc_compiles_anew_and_none_at_all_is_not_needed(compiler: Compiler) -> None:
    compiler.start()
    compiler.version = None
    assert (compiler.start(), compiler.times) == (None, 1)
    compiler.version = "0.99"
    assert (compiler.start(), compiler.times) == (None, 2)
    assert programs.kept() == Kept(str(compiler.path), "0.99", None)


def test_without_either_it_is_the_compilers_error(compiler: Compiler) -> None:
    compiler.version = None
    with pytest.raises(KvmtraceError, match="bcc is not installed") as raised:
        compiler.start()
    assert raised.value.hint == "apt install it"


def test_what_is_damaged_is_said_once_and_compiled_anew(compiler: Compiler) -> None:
    compiler.start()
    (kept,) = compiler.path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-5])
    assert compiler.start() == f"{kept} is not used: it is damaged"
    assert (compiler.start(), compiler.times) == (None, 2)
    ProgramCache().write(kept.name, {"bcc": COMPILED.bcc})
    assert compiler.start() == f"{kept} is not used: it is damaged"
    assert (compiler.start(), compiler.times) == (None, 3)


def test_where_nothing_can_be_kept_each_start_compiles(compiler: Compiler) -> None:
    compiler.path.write_text("a file")
    assert compiler.start()
    assert compiler.start()
    assert compiler.times == 2
    found = programs.kept()
    assert found is not None
    assert (found.bcc, programs.keep().bcc) == (None, None)
    assert found.trouble


def test_compiling_ahead(compiler: Compiler) -> None:
    assert programs.keep() == Kept(str(compiler.path), COMPILED.bcc, None)
    assert (compiler.start(), compiler.times) == (None, 1)


def test_programs_for_kprobes_are_compiled_where_they_are_needed(compiler: Compiler) -> None:
    compiler.start()
    compiler.trampolines = False
    compiler.start()
    assert compiler.kprobes == [False], "what is kept is used"
    # A function could not be had by fentry: from now on all starts have both.
    cache = ProgramCache()
    programs._compiled(programs._layout(cache), cache, kprobes=True)
    assert compiler.kprobes == [False, True]
    compiler.version = None
    compiler.start()
    assert len(compiler.kprobes) == 2


def test_without_trampolines_all_is_compiled_at_once(compiler: Compiler) -> None:
    compiler.trampolines = False
    compiler.start()
    assert compiler.kprobes == [True]
    programs.keep()
    assert compiler.kprobes == [True, True]


def test_every_kprobe_can_be_left_out() -> None:
    for name in re.findall(r"^int kp_(\w+)\(", TEXT, re.MULTILINE):
        assert f"\n#ifdef KP_{name}\nint kp_{name}(" in TEXT


def test_a_function_that_cannot_be_had_is_no_trampoline() -> None:
    function = FunctionType("", (1 << 31) - 1, ())
    layout: Any = SimpleNamespace(specs=list(SPECS.values()), function=lambda _spec: function)
    assert not programs._has_trampolines(layout)
    layout.function = lambda _spec: None
    assert programs._has_trampolines(layout), "nothing is there to be tried, nor to be attached"
