"""Hardware errors as firmware reports them to the kernel: CPER records for QEMU's injection.

A record is a Generic Error Status Block with one section (ACPI 6.5, 18.3.2.7.1; the sections: UEFI
2.10, appendix N.2). QEMU puts it where firmware would and raises the interrupt that a GHES has;
from there on the kernel does what it does on hardware.
"""

from __future__ import annotations

import base64
import struct
import time
import uuid
from dataclasses import dataclass
from enum import IntEnum

from tests.lab.machine import Machine

MEMORY = uuid.UUID("a5bc1114-6f64-4ede-b863-3e83ed7c83b1")
ARM_PROCESSOR = uuid.UUID("e19e3d16-bc11-11e4-9caa-c2051d5d46b0")
UNKNOWN = uuid.UUID("6b766d74-7261-6365-2d6c-61622d746573")

THRESHOLD_EXCEEDED = 1 << 3
"""Flag of a section: more corrected errors there than firmware tolerates."""

PACE = 1.6
"""Seconds between two records: the kernel looks at one before QEMU may write the next."""

_UNCORRECTABLE, _CORRECTABLE, _ONE_ENTRY = 1 << 0, 1 << 1, 1 << 4


class Severity(IntEnum):
    """In CPER's numbers."""

    RECOVERABLE = 0
    FATAL = 1
    CORRECTED = 2


@dataclass(frozen=True)
class Dimm:
    """Where a memory error was, as far as firmware says so."""

    node: int
    card: int
    module: int
    handle: int


def memory(address: int, *, dimm: Dimm | None = None) -> bytes:
    """A memory error section: `address` is physical, exact to 64 bytes."""
    valid = 1 << 1 | 1 << 2  # physical address and its mask
    node = card = module = handle = 0
    if dimm is not None:
        valid |= 1 << 3 | 1 << 4 | 1 << 5 | 1 << 17
        node, card, module, handle = dimm.node, dimm.card, dimm.module, dimm.handle
    return struct.pack(
        "<QQQQ8H3QBBHHH",
        *(valid, 0, address, ~0x3F & (1 << 64) - 1),
        *(node, card, module, 0, 0, 0, 0, 0),
        *(0, 0, 0, 3, 0, 0, 0, handle),
    )


def arm_processor(address: int) -> bytes:
    """An Arm processor error section: a cache error at a physical address."""
    cache = 1 << 1
    info = struct.pack("<BBHBHBQQQ", 0, 32, 1 << 4, cache, 0, 0, 0, 0, address)
    head = struct.pack("<IHHIB3xQQII", 0, 1, 0, 40 + len(info), 0, 0, 0, 0, 0)
    return head + info


def record(kind: uuid.UUID, section: bytes, severity: Severity, flags: int = 0) -> bytes:
    """The whole block around a section."""
    entry = struct.pack(
        "<16sIHBBI16s20sQ", kind.bytes_le, severity, 0x300, 0, flags, len(section), b"", b"", 0
    )
    kinds = _CORRECTABLE if severity == Severity.CORRECTED else _UNCORRECTABLE
    data = entry + section
    return struct.pack("<IIIII", kinds | _ONE_ENTRY, 0, 0, len(data), severity) + data


def inject(
    machine: Machine, kind: uuid.UUID, section: bytes, severity: Severity, flags: int = 0
) -> None:
    """Have firmware notify the machine's kernel, and leave it the time to take it up."""
    cper = base64.b64encode(record(kind, section, severity, flags)).decode()
    machine.qmp("inject-ghes-v2-error", cper=cper)
    time.sleep(PACE)


def memory_error(
    machine: Machine,
    address: int,
    severity: Severity = Severity.RECOVERABLE,
    *,
    flags: int = 0,
    dimm: Dimm | None = None,
) -> None:
    """A memory error at a physical address."""
    inject(machine, MEMORY, memory(address, dimm=dimm), severity, flags)
