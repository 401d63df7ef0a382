"""Machine checks on x86: QEMU's monitor writes a record into a bank of the (virtual) CPU.

The kernel then acts as on hardware. It finds the record by polling, or by the exception that an
uncorrected error raises, and traces it. It poisons the page if the record's status means that data
is lost and its address is physical.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from tests.lab.errors import LabTimeout
from tests.lab.harness import PATIENCE, Unstageable
from tests.lab.machine import Machine

CPU = 1
"""The CPU, of two, whose banks get the records."""

_CHECK_INTERVAL = "/sys/devices/system/machinecheck/machinecheck*/check_interval"

# MCi_STATUS (Intel SDM vol. 3B, 17.3.2.2; AMD APM vol. 2, 9.3.2.2)
_VALID, _UNCORRECTED, _ENABLED, _MISCV, _ADDRV = (1 << bit for bit in (63, 61, 60, 59, 58))
_SIGNALLED = 1 << 56  # Intel's
_DEFERRED, _POISON = 1 << 44, 1 << 43  # AMD's
_ERROR = _VALID | _ENABLED | _ADDRV


class Record(NamedTuple):
    """The registers of a bank that describe an error, without its address.

    ``options``: options of the monitor's `mce` command.
    """

    bank: int
    status: int
    misc: int = 0
    mcg_status: int = 0
    options: str = ""


# AMD without SMCA, like the lab's EPYC. The address is physical for memory errors of the
# northbridge (bank 4, extended error code 8), and in other banks if POISON is set
# (amd_mce_usable_address; 6.1 does not check). Bits 52:38 are not a count.
_AT_MEMORY, _ELSEWHERE = 0x080A13, 0x0135
CORRECTED = Record(4, _ERROR | 3 << 38 | _AT_MEMORY)
LOST = Record(4, _ERROR | _DEFERRED | _POISON | _AT_MEMORY)
POISON_ELSEWHERE = Record(9, _ERROR | _DEFERRED | _POISON | _ELSEWHERE)
NOT_PHYSICAL = Record(9, _ERROR | _DEFERRED | _ELSEWHERE)
CORRECTED_NOT_PHYSICAL = Record(9, _ERROR | _ELSEWHERE)

# Intel: MCi_MISC has the kind of the address (mode 2: physical) and its granularity (2^6 bytes).
# Bits 52:38 of a corrected error's status are a count.
INTEL_BANK = 5
_PHYSICAL, _LINEAR = 2 << 6 | 6, 1 << 6 | 6
_READ, _SCRUBBED = 0x0090, 0x00C0
INTEL_THREE_CORRECTED = Record(INTEL_BANK, _ERROR | _MISCV | 3 << 38 | _READ, _PHYSICAL)
INTEL_LINEAR = Record(INTEL_BANK, _ERROR | _MISCV | _READ, _LINEAR)
INTEL_UNKNOWN_MODE = Record(INTEL_BANK, _ERROR | _READ)
INTEL_LOST = Record(
    INTEL_BANK,
    _ERROR | _UNCORRECTED | _MISCV | _SIGNALLED | _SCRUBBED,
    _PHYSICAL,
    mcg_status=5,  # in progress; the interrupted program can be restarted
    options="-b",  # on Intel all CPUs take the exception
)


def poll_often(machine: Machine) -> None:
    """Let the kernel poll the banks every second; its default is every five minutes."""
    if machine.run(f"ls {_CHECK_INTERVAL}").status:
        raise Unstageable("this machine has no machine check banks: only x86 has them")
    machine.run(f"echo 1 | tee {_CHECK_INTERVAL}", check=True)


def inject(machine: Machine, record: Record, address: int) -> None:
    """Inject an error at this address, and wait until the kernel has read it from the bank."""
    bank, status, misc, mcg_status, options = record
    line = f"mce {options} {CPU} {bank} {status:#x} {mcg_status:#x} {address:#x} {misc:#x}"
    answer = machine.qmp("human-monitor-command", **{"command-line": line})["return"]
    assert not answer, answer
    before = _polls(machine)
    _wait(lambda: _polls(machine) > before, "a poll of the machine check banks")


def inject_poison(machine: Machine, address: int) -> None:
    """Inject the loss of the data at this address, and wait until its page is poisoned."""
    before = _corrupted(machine)
    inject(machine, LOST, address)
    _wait(lambda: _corrupted(machine) > before, "the page's poison")


def address_in(machine: Machine, pfn: int, at: int = 0x240) -> int:
    """Physical address of a byte of that page."""
    return (pfn << machine.page_shift) + at


def _polls(machine: Machine) -> int:
    """Number of polls of that CPU's banks; read on that CPU, so that no poll is in progress."""
    command = f"taskset -c {CPU} grep MCP: /proc/interrupts"
    return int(machine.run(command, check=True).stdout.split()[1 + CPU])


def _corrupted(machine: Machine) -> int:
    line = machine.run("grep HardwareCorrupted: /proc/meminfo", check=True).stdout
    return int(line.split()[1])


def _wait(over: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not over():
        if time.monotonic() > deadline:
            raise LabTimeout(f"no {what} in {PATIENCE:.0f} s")
        time.sleep(0.1)
