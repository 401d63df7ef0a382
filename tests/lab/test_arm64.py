"""arm64: both sources on its kernels, and hardware errors reported by firmware.

``make matrix`` runs every scenario on every arm64 kernel.
"""

from __future__ import annotations

import pytest

from tests.lab.bundled import bundled
from tests.lab.conftest import Boot
from tests.lab.ghes import ghes
from tests.lab.harness import end_following
from tests.lab.hosts import doctor
from tests.lab.scenarios import gmem_poison, hva_anon

pytestmark = pytest.mark.lab


def test_from_the_memory_controller_to_the_vmm(boot: Boot) -> None:
    machine = boot("arm64-newest", ras=True)
    ghes(machine, may_know_less=False)
    bundled(machine)


def test_pages_of_another_size(boot: Boot) -> None:
    machine = boot("arm64-16k")
    assert machine.page_shift == 14
    gmem_poison(machine, "ftrace")
    hva_anon(machine, "ftrace")
    end_following(machine)


def test_the_poison_event_in_a_system_of_its_own(boot: Boot) -> None:
    """Linux 6.19 to 7.1: kvmtrace finds the event and the names of page types.

    By ftrace only: compiling takes another minute, so ``make matrix`` covers bpf.
    """
    machine = boot("arm64-7.0")
    events = machine.run(
        "cd /sys/kernel/tracing/events && ls -d */memory_failure_event", check=True
    )
    assert events.stdout.split() == ["memory_failure/memory_failure_event"]
    gmem_poison(machine, "ftrace")
    hva_anon(machine, "ftrace")
    end_following(machine)
    (tried,) = doctor(machine, "ftrace")["sources"]
    targets = {probe["name"]: probe["target"] for probe in tried["probes"] if probe["attached"]}
    assert targets["poison"] == "memory_failure:memory_failure_event"
    assert targets["vncr"] == "kvm_handle_vncr_abort"
