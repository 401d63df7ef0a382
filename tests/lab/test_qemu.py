"""A real VMM loses a page; see qemu_guest.py."""

from __future__ import annotations

import pytest

from tests.lab.harness import end_following
from tests.lab.libvirt_guest import libvirt_advice
from tests.lab.machine import Machine
from tests.lab.qemu_guest import MEMORY, check_with_page_gone, qemu_advice, qemu_loses_a_page
from tests.lab.scenarios import SOURCES

pytestmark = pytest.mark.lab


@pytest.mark.parametrize("memory", MEMORY)
def test_what_qemu_does_with_a_page_gone(machine: Machine, memory: str) -> None:
    check_with_page_gone(machine, memory)


@pytest.mark.parametrize("source", SOURCES)
def test_qemu_loses_a_page(machine: Machine, source: str) -> None:
    qemu_loses_a_page(machine, source)
    end_following(machine)


def test_what_people_are_advised_to_do_helps(machine: Machine) -> None:
    qemu_advice(machine, "ftrace")


def test_what_is_printed_for_virsh_helps(machine: Machine) -> None:
    libvirt_advice(machine, "ftrace")
