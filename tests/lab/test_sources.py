"""Every scenario on the newest kernel by bpf and by both side by side; on others what differs.

By ftrace they run in test_without.py, on a machine without bcc. ``make matrix`` runs all of them
everywhere, those too that want a machine of another kind.
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

# Kernels on which the sources work in another way than on the newest.
OTHER_KERNELS = {
    "bookworm": "6.1: no memory-fault exit, BTF arguments, fprobe; bcc without kfuncs on modules",
    "trixie": "kvm_gmem_get_pfn with five arguments",
}


CASES = [
    pytest.param(scenario, source, id=f"{source}-{scenario.name}")
    for source in ("both", "bpf")  # what follows both goes on with one of them
    for scenario in ORDINARY
    if source in scenario.sources
]


@pytest.fixture(scope="module", autouse=True)
def _nothing_goes_on(shared_machine: Shared) -> Iterator[None]:
    """Other tests look at what is attached."""
    yield
    if shared_machine.machine is not None and shared_machine.machine.alive:
        end_following(shared_machine.machine)


@pytest.mark.parametrize("source", SOURCES)
def test_every_probe_attaches(machine: Machine, source: str) -> None:
    with following(machine, source) as (watch,):
        assert watch.not_attached() == []


def test_functions_are_probed_by_trampolines(machine: Machine) -> None:
    """A program that fentry refuses goes on by kprobe, which costs more and is not reported."""
    ways = ways_of_bpf(machine)
    assert ways["run"] == "fexit+raw_tracepoint"
    assert {name: via for name, via in ways.items() if "probe" in via} == {}


def ways_of_bpf(machine: Machine) -> dict[str, str]:
    """{probe: how it is attached} of those that are."""
    (tried,) = doctor(machine, "bpf")["sources"]
    return {probe["name"]: probe["via"] for probe in tried["probes"] if probe["attached"]}


@pytest.mark.parametrize(("scenario", "source"), CASES)
def test_scenario(machine: Machine, scenario: Scenario, source: str) -> None:
    scenario.run(machine, source)


# What these kernels do not have; by bpf all else attaches.
NOT_THERE = {"bookworm": {"gmem", "gmem_error"}}


@pytest.mark.parametrize("kernel", OTHER_KERNELS)
def test_other_kernel(boot: Boot, kernel: str) -> None:
    """The half of the story that does not need guest_memfd, and it must not be all unstageable."""
    machine = boot(kernel)
    blind = {"ftrace"} if kernel == "bookworm" else set()  # no BTF arguments, so no run probe
    if not blind:
        parity(machine)  # first: what it starts is followed on, and bcc takes a minute to start
    for source in SOURCES:
        hva_anon(machine, source)
        if source == "bpf":
            with following(machine, source) as (watch,):
                assert set(watch.not_attached()) == NOT_THERE.get(kernel, set())
        with pytest.raises(Unstageable) if source in blind else contextlib.nullcontext():
            unannotated(machine, source)
    end_following(machine)
    if kernel == "bookworm":
        # This bcc names no modules: only functions of the kernel itself have trampolines.
        ways = ways_of_bpf(machine)
        assert ways["run"].startswith("kprobe")
        assert {ways["sigbus"], ways["sigbus_forced"]} == {"fentry"}
