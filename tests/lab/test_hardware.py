"""Hardware errors in pages of VMs, and poison in the kernel's own pages.

``make matrix`` runs these on every kernel, and on an Intel CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.all_at_once import ALL_AT_ONCE, all_at_once
from tests.lab.conftest import Boot, prepared
from tests.lab.kernel_pages import KERNEL_PAGES, kernel_pages
from tests.lab.machine import DEFAULT, Machine
from tests.lab.machine_check import (
    BOOT,
    end_serving,
    machine_check,
    machine_check_elsewhere,
    machine_check_gmem,
)
from tests.lab.scenarios import SOURCES

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def failing(pytestconfig: pytest.Config) -> Iterator[Machine]:
    prepared(pytestconfig, DEFAULT)
    with Machine.boot(DEFAULT, **BOOT) as machine:
        yield machine


@pytest.mark.parametrize("source", SOURCES)
def test_from_the_hardware_to_the_verdict(failing: Machine, source: str) -> None:
    machine_check_gmem(failing, source)
    machine_check(failing, source)
    machine_check_elsewhere(failing, source)
    end_serving(failing)


def test_the_kernels_own_pages(boot: Boot) -> None:
    kernel_pages(boot(DEFAULT, **KERNEL_PAGES.boot), "bpf")


def test_the_worst_of_many_comes_first(boot: Boot) -> None:
    """By ftrace; ``make matrix`` covers bpf."""
    all_at_once(boot(DEFAULT, **ALL_AT_ONCE.boot), "ftrace")
