"""Scenarios on the newest kernel by bpf, and by both sources at once; a few on other kernels.

test_without.py runs them by ftrace, on a machine without bcc. ``make matrix`` runs all on every
kernel, including those that need other boot options.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.lab.conftest import Boot, Shared
from tests.lab.harness import Unstageable, end_following, following
from tests.lab.hosts import doctor
from tests.lab.machine import Machine
from tests.lab.scenarios import SCENARIOS, SOURCES, Scenario, hva_anon, parity, unannotated

pytestmark = pytest.mark.lab

ORDINARY = [scenario for scenario in SCENARIOS if not scenario.boot]

# Kernels on which the sources work differently than on the newest.
OTHER_KERNELS = {
    "bookworm": "6.1: no memory-fault exit, BTF arguments, fprobe; bcc without kfuncs on modules",
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
    assert ways["run"] == "fexit+raw_tracepoint"
    assert {name: via for name, via in ways.items() if "probe" in via} == {}


def ways_of_bpf(machine: Machine) -> dict[str, str]:
    """{probe: how it is attached}, of the attached probes."""
    (tried,) = doctor(machine, "bpf")["sources"]
    return {probe["name"]: probe["via"] for probe in tried["probes"] if probe["attached"]}


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
    if kernel == "bookworm":
        # This bcc does not support modules: only built-in functions have trampolines.
        ways = ways_of_bpf(machine)
        assert ways["run"].startswith("kprobe")
        assert {ways["sigbus"], ways["sigbus_forced"]} == {"fentry"}
