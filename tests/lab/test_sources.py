"""Scenarios on the newest kernel by bpf, and by both sources at once; a few on other kernels.

test_without.py runs them by ftrace, on a machine without bcc. ``make matrix`` runs all on every
kernel, including those that need other boot options.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator

import pytest

from tests.lab.conftest import Boot, Shared
from tests.lab.harness import (
    PATIENCE,
    Unstageable,
    assert_refused,
    end_following,
    following,
    kvmtrace,
)
from tests.lab.hosts import NO_TRACEFS, doctor
from tests.lab.machine import Machine
from tests.lab.scenarios import SCENARIOS, SOURCES, Scenario, hva_anon, parity, unannotated

pytestmark = pytest.mark.lab

ORDINARY = [scenario for scenario in SCENARIOS if not scenario.boot]

# Kernels on which the sources work differently than on the newest.
OTHER_KERNELS = {
    "bookworm": "6.1: no memory-fault exit, BTF arguments, fprobe; bcc 0.26",
    "trixie": "kvm_gmem_get_pfn with five arguments",
}


CASES = [
    pytest.param(scenario, source, id=f"{source}-{scenario.name}")
    for source in ("both", "bpf")  # bpf is still followed after both
    for scenario in ORDINARY
    if source in scenario.sources
]


@pytest.fixture(scope="module", autouse=True)
def _end_followed(shared_machine: Shared) -> Iterator[None]:
    """End the followed kvmtraces: other tests check what is attached."""
    yield
    if shared_machine.machine is not None and shared_machine.machine.alive:
        end_following(shared_machine.machine)


@pytest.mark.parametrize("source", SOURCES)
def test_every_probe_attaches(machine: Machine, source: str) -> None:
    with following(machine, source) as (watch,):
        assert watch.not_attached() == []


def test_functions_are_probed_by_trampolines(machine: Machine) -> None:
    """If fentry refuses a function, a kprobe is used, which costs more and is not reported."""
    ways = ways_of_bpf(machine)
    assert ways["run"] == "tracepoint"  # raw ones are preempted on this kernel
    assert {name: via for name, via in ways.items() if "probe" in via} == {}


def ways_of_bpf(machine: Machine) -> dict[str, str]:
    """{probe: how it is attached}, of the attached probes."""
    (tried,) = doctor(machine, "bpf")["sources"]
    return {probe["name"]: probe["via"] for probe in tried["probes"] if probe["attached"]}


def test_without_tracefs_run_is_on_the_raw_tracepoint(machine: Machine) -> None:
    """By copies, because programs there are preempted on this kernel."""
    answer = kvmtrace(machine, "doctor --json --source bpf", mount_change=NO_TRACEFS)
    (tried,) = json.loads(answer.stdout)["sources"]
    (run,) = [probe for probe in tried["probes"] if probe["name"] == "run"]
    assert (run["attached"], run["via"]) == (True, "raw_tracepoint")


# No function has a type: then none has a trampoline.
BY_KPROBES = """
import sys
from kvmtrace.cli import main
from kvmtrace.sources.bpf.layout import Layout
Layout.function = lambda self, spec: None
sys.argv[1:] = ["doctor", "--json", "--source", "bpf"]
main()
"""


def test_without_trampolines_kprobes_do(machine: Machine) -> None:
    answer = json.loads(machine.run(["python3", "-c", BY_KPROBES], timeout=PATIENCE).stdout)
    (tried,) = answer["sources"]
    ways = {probe["name"]: probe.get("via") for probe in tried["probes"]}
    assert ways["run"] == "tracepoint"
    assert {ways["faultin"], ways["gmem"], ways["vm_new"]} == {"kretprobe"}
    assert {ways["sigbus"], ways["vm_gone"]} == {"kprobe"}


# As root of this host, but with nothing of bcc's that Python could find.
WITHOUT_BCC = "for d in /usr/lib/python3*/dist-packages/bcc; do mount -t tmpfs none $d; done"


def test_what_was_compiled_needs_no_bcc(machine: Machine) -> None:
    machine.run("rm -rf /var/cache/kvmtrace", check=True)
    end_following(machine)
    assert_refused(kvmtrace(machine, "events --source bpf", mount_change=WITHOUT_BCC), "bcc")
    first = kvmtrace(machine, "compile")
    assert re.search(r"are kept in /var/cache/kvmtrace \(bcc [0-9.]+\)", first.stdout), first
    assert "were kept already" in kvmtrace(machine, "compile", mount_change=WITHOUT_BCC).stdout
    judged = kvmtrace(machine, "doctor --source bpf", mount_change=WITHOUT_BCC)
    assert re.search(r"✓ yes +eBPF programs +compiled for this kernel", judged.stdout), judged
    assert re.search(r"✓ yes +source bpf", judged.stdout), judged


def test_a_cache_that_others_may_write_to_is_not_used(machine: Machine) -> None:
    machine.run("kvmtrace compile && chmod 777 /var/cache/kvmtrace", check=True)
    try:
        told = kvmtrace(machine, "events --source bpf --duration 1s")
        assert "/var/cache/kvmtrace is not used" in told.stderr, told
        assert told.status == 0
    finally:
        machine.run("chmod 755 /var/cache/kvmtrace", check=True)


@pytest.mark.parametrize(("scenario", "source"), CASES)
def test_scenario(machine: Machine, scenario: Scenario, source: str) -> None:
    scenario.run(machine, source)


# Probes that these kernels do not support; by bpf all others attach.
NOT_THERE = {"bookworm": {"gmem", "gmem_error"}}


@pytest.mark.parametrize("kernel", OTHER_KERNELS)
def test_other_kernel(boot: Boot, kernel: str) -> None:
    """Scenarios that do not need guest_memfd; only the expected ones are unstageable."""
    machine = boot(kernel)
    blind = {"ftrace"} if kernel == "bookworm" else set()  # no BTF arguments, so no run probe
    if not blind:
        parity(machine)  # first: its kvmtraces are used on, and bcc takes a minute to start
    for source in SOURCES:
        hva_anon(machine, source)
        if source == "bpf":
            with following(machine, source) as (watch,):
                assert set(watch.not_attached()) == NOT_THERE.get(kernel, set())
        with pytest.raises(Unstageable) if source in blind else contextlib.nullcontext():
            unannotated(machine, source)
    end_following(machine)
    ways = ways_of_bpf(machine)
    assert ways["run"] == "raw_tracepoint"
    # Trampolines are the loader's business, also if bcc supports modules.
    assert ways["faultin"] == "fexit"
