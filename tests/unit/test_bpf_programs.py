"""The programs' names: what attaches them follows from them."""

from __future__ import annotations

import re

import pytest

from kvmtrace import probes
from kvmtrace.sources.bpf.compiler import PARTS, bpf_dir, joined

TEXT = joined()
NAMES = frozenset(re.findall(r"^int ((?:tp|kp|kr)_\w+)\(", TEXT, re.MULTILINE))
SPECS = {
    spec.name: spec
    for spec in (*probes.specs("x86_64"), *probes.specs("aarch64"), *probes.context_specs())
}


@pytest.mark.parametrize("name", SPECS)
def test_a_probe_has_its_program(name: str) -> None:
    if SPECS[name].is_tracepoint:
        assert f"tp_{name}" in NAMES
    else:
        assert f"\n#ifdef FN_{name}\nint FN_{name}(" in TEXT


def test_a_program_belongs_to_a_probe() -> None:
    for name in NAMES:
        way, _, probe = name.partition("_")
        # By its return KVM_RUN is attached to a tracepoint: see bpf/exits.c.
        assert probe in SPECS or name == "tp_run_under_way"
        assert way == "tp" or not SPECS[probe].is_tracepoint
        assert way != "kr" or (SPECS[probe].at == "return" and f"kp_{probe}" in NAMES)


@pytest.mark.parametrize("name", [s.name for s in SPECS.values() if not s.is_tracepoint])
def test_a_kprobe_sees_what_its_probe_is_for(name: str) -> None:
    """A probe at the return has a kretprobe, but for ``run``: it has a tracepoint in its place."""
    if f"kp_{name}" in NAMES and name != "run":
        assert (f"kr_{name}" in NAMES) == (SPECS[name].at == "return")


def test_errors_name_the_part() -> None:
    for part in PARTS:
        first = (bpf_dir() / part).read_text().partition("\n")[0]
        assert f'#line 1 "{part}"\n{first}\n' in TEXT
