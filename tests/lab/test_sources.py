"""Every scenario on the newest kernel with each source; on others what tells them apart.

``make matrix`` runs all of them everywhere.
"""

from __future__ import annotations

import contextlib

import pytest

from tests.lab.conftest import Boot
from tests.lab.drive import Unstageable, end_following
from tests.lab.machine import Machine
from tests.lab.scenarios import SCENARIOS, Scenario, hva_anon, parity, unannotated

pytestmark = pytest.mark.lab

SOURCES = ("bpf", "ftrace")

# Kernels on which the sources work in another way than on the newest.
OTHER_KERNELS = {
    "bookworm": "6.1: no memory-fault exit, no BTF arguments, no fprobe",
    "bookworm-backports": "bcc without kfuncs on modules",
    "trixie": "kvm_gmem_get_pfn with five arguments",
}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
@pytest.mark.parametrize("source", SOURCES)
def test_scenario(machine: Machine, scenario: Scenario, source: str) -> None:
    scenario.run(machine, source)


def test_parity(machine: Machine) -> None:
    parity(machine)
    end_following(machine)


@pytest.mark.parametrize("kernel", OTHER_KERNELS)
def test_other_kernel(boot: Boot, kernel: str) -> None:
    """The half of the story that does not need guest_memfd, and it must not be all unstageable."""
    machine = boot(kernel)
    blind = {"ftrace"} if kernel == "bookworm" else set()  # no BTF arguments, so no run probe
    for source in SOURCES:
        hva_anon(machine, source)
        with pytest.raises(Unstageable) if source in blind else contextlib.nullcontext():
            unannotated(machine, source)
    if not blind:
        parity(machine)
    end_following(machine)
