"""arm64: the kernel and both sources there, and errors that begin in hardware.

``make matrix`` has every scenario on every arm64 kernel.
"""

from __future__ import annotations

import pytest

from tests.lab.conftest import Boot
from tests.lab.drive import end_following
from tests.lab.ghes import ghes
from tests.lab.scenarios import gmem_poison, hva_anon

pytestmark = pytest.mark.lab


def test_from_the_memory_controller_to_the_vmm(boot: Boot) -> None:
    ghes(boot("arm64-newest", ras=True), may_know_less=False)


def test_pages_of_another_size(boot: Boot) -> None:
    machine = boot("arm64-16k")
    assert machine.page_shift == 14
    gmem_poison(machine, "ftrace")
    hva_anon(machine, "ftrace")
    end_following(machine)
