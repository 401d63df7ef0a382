"""Errors that start in the hardware: nobody but the kernel itself poisons a page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.conftest import Boot, prepared
from tests.lab.machine import DEFAULT, Machine
from tests.lab.machine_check import (
    BOOT,
    INTEL_BOOT,
    end_serving,
    machine_check,
    machine_check_elsewhere,
    machine_check_gmem,
    machine_check_intel,
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


def test_registers_of_intel(boot: Boot) -> None:
    machine = boot(**INTEL_BOOT)
    machine_check_intel(machine, "ftrace")
    end_serving(machine)
