"""What this kernel looks like is found out once: its types per build, its symbols per boot."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from kvmtrace import probes
from kvmtrace.linux import kvm_module
from kvmtrace.linux.btf import FunctionType
from kvmtrace.linux.kallsyms import Symbol
from kvmtrace.sources.bpf import layout
from kvmtrace.sources.bpf.copies import PLACEHOLDERS
from kvmtrace.sources.bpf.layout import Layout
from kvmtrace.sources.bpf.program_cache import ProgramCache

RUN = "kvm_arch_vcpu_ioctl_run"


class Host:
    """A kernel with kvm; what was asked of it."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.asked: list[str] = []
        self.address = 0xFFFFFFFF81000000
        self.build = b"build one"
        self.modules: tuple[str, ...] = ("kvm:7",)
        self.more: tuple[str, ...] = ()
        self.variables: tuple[str, ...] = tuple(PLACEHOLDERS)
        monkeypatch.setattr(layout, "Btf", lambda: self)
        monkeypatch.setattr(layout, "read_symbols", self.symbols)
        monkeypatch.setattr(kvm_module, "loaded", lambda: self.modules)
        monkeypatch.setattr(layout, "_bytes", lambda _path: self.build)
        monkeypatch.setattr(layout, "SYS_BTF", str(directory))
        (directory / "kvm").write_bytes(b"types")
        self.has_kvm = True

    def symbols(self, names: Iterable[str]) -> dict[str, Symbol]:
        self.asked.append("symbols")
        names = (*self.variables, *self.more)
        found = {name: Symbol(None, self.address and self.address + 8) for name in names}
        return {**found, RUN: Symbol("kvm", self.address)}

    def offset(self, struct: str, path: str) -> int | None:
        self.asked.append("types")
        return 8 if struct == "kvm_vcpu" else None

    def size(self, struct: str) -> int | None:
        return None

    def arguments(self, function: str) -> tuple[str, ...] | None:
        return None

    def function(self, name: str) -> FunctionType | None:
        return FunctionType("kvm", 77, ("vcpu",)) if name == RUN else None

    def layout(self) -> tuple[Layout, set[str]]:
        """A new one, and what was asked for it."""
        self.asked.clear()
        cache = ProgramCache(str(self.directory / "kept"), os.geteuid())
        made = Layout(probes.specs("x86_64"), cache)
        assert cache.trouble is None
        return made, set(self.asked)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


BOTH = {"symbols", "types"}


def facts(made: Layout) -> tuple[Any, ...]:
    functions = [made.function(spec) for spec in made.specs]
    return made.offsets, made.symbols, made.cflags(), made.addresses(), functions


def test_the_second_start_asks_nothing(host: Host) -> None:
    first, asked = host.layout()
    assert asked == BOTH
    second, asked = host.layout()
    assert asked == set()
    assert facts(second) == facts(first)
    assert "-DFN_run=fn_run" in second.cflags()
    assert "-DNARGS_run=1" in second.cflags()


def test_another_boot_has_other_addresses_and_the_same_macros(host: Host) -> None:
    first, _ = host.layout()
    host.address += 1 << 24
    host.modules = ("kvm:9",)
    second, asked = host.layout()
    assert asked == {"symbols"}
    assert second.cflags() == first.cflags()
    assert set(second.addresses()) == set(PLACEHOLDERS.values())
    assert second.addresses() != first.addresses()


def test_another_build_has_other_types(host: Host) -> None:
    host.layout()
    host.build = b"build two"
    assert "types" in host.layout()[1]


def test_what_cannot_be_told_apart_is_not_kept(host: Host) -> None:
    host.build = b""
    host.layout()
    assert "types" in host.layout()[1]


def test_kvm_that_comes_meanwhile(host: Host) -> None:
    """Its file is there, and the types were read before: those are no layout with kvm."""
    host.has_kvm = False
    host.layout()
    assert "types" in host.layout()[1]


def test_without_kvm_symbols_are_read_each_time(host: Host) -> None:
    host.modules = ()
    host.layout()
    assert "symbols" in host.layout()[1]


def test_hidden_addresses_are_not_kept(host: Host) -> None:
    host.address = 0
    made, _ = host.layout()
    assert not [flag for flag in made.cflags() if flag.startswith("-DSYM_")]
    assert "symbols" in host.layout()[1]


def test_what_is_no_layout_is_made_anew(host: Host) -> None:
    first, _ = host.layout()
    cache = ProgramCache(str(host.directory / "kept"), os.geteuid())
    for name in os.listdir(cache.path):
        assert cache.write(name, {"offsets": 7})
    host.asked.clear()
    second = Layout(probes.specs("x86_64"), cache)
    assert set(host.asked) == BOTH
    assert cache.trouble
    assert facts(second) == facts(first)


@pytest.mark.parametrize(
    ("skips", "more", "variables"),
    [
        (False, ("tracepoint_srcu",), True),  # 6.12
        (False, (), True),  # 6.18
        (True, ("tracepoint_srcu", "init_srcu_struct_fast"), True),  # 7.3
        (True, ("tracepoint_srcu", "__init_srcu_struct_fast"), True),  # with lockdep
        (False, ("init_srcu_struct_fast",), True),  # it is for others
        (True, ("init_srcu_struct_fast",), False),  # who knows
        (False, (), False),
    ],
)
def test_raw_tracepoint_programs_that_are_preempted(
    host: Host, more: tuple[str, ...], *, skips: bool, variables: bool
) -> None:
    host.more = more
    host.variables = tuple(PLACEHOLDERS) if variables else ()
    assert host.layout()[0].skips_raw_tracepoints is skips


def test_a_kernel_without_the_helper_for_registers(host: Host) -> None:
    assert "-DHAS_TASK_PT_REGS" not in host.layout()[0].cflags()
    host.more, host.modules = ("bpf_task_pt_regs",), ("kvm:9",)
    assert "-DHAS_TASK_PT_REGS" in host.layout()[0].cflags()
