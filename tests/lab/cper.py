"""Hardware errors as firmware reports them: CPER records that QEMU injects.

A record is a Generic Error Status Block with one section (ACPI 6.5, 18.3.2.7.1; the sections: UEFI
2.10, appendix N.2). QEMU writes it where firmware would and raises the GHES interrupt; the kernel
then handles it as on real hardware.
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
"""Flag of a section: the number of corrected errors exceeds the firmware's threshold."""

PACE = 1.6
"""Seconds between two records: the kernel has to read one before QEMU writes the next."""

_UNCORRECTABLE, _CORRECTABLE, _ONE_ENTRY = 1 << 0, 1 << 1, 1 << 4


class Severity(IntEnum):
    """Severities by CPER's numbers."""

    RECOVERABLE = 0
    FATAL = 1
    CORRECTED = 2


@dataclass(frozen=True)
class Dimm:
    """Location of a memory error as firmware reports it."""

    node: int
    card: int
    module: int
    handle: int


def memory(address: int, *, dimm: Dimm | None = None) -> bytes:
    """Build a memory error section; `address` is physical and exact to 64 bytes."""
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
    """Build an Arm processor error section: a TLB error, then a cache error at `address`.

    The kernel poisons only the page of the cache error.
    """
    tlb, cache = 1 << 2, 1 << 1
    infos = b"".join(
        struct.pack("<BBHBHBQQQ", 0, 32, 1 << 4, kind, 0, 0, 0, 0, at)
        for kind, at in ((tlb, address ^ 1 << 20), (cache, address))
    )
    head = struct.pack("<IHHIB3xQQII", 0, 2, 0, 40 + len(infos), 0, 0, 0, 0, 0)
    return head + infos


def record(kind: uuid.UUID, section: bytes, severity: Severity, flags: int = 0) -> bytes:
    """Build the status block around a section."""
    entry = struct.pack(
        "<16sIHBBI16s20sQ", kind.bytes_le, severity, 0x300, 0, flags, len(section), b"", b"", 0
    )
    kinds = _CORRECTABLE if severity == Severity.CORRECTED else _UNCORRECTABLE
    data = entry + section
    return struct.pack("<IIIII", kinds | _ONE_ENTRY, 0, 0, len(data), severity) + data


def inject(
    machine: Machine, kind: uuid.UUID, section: bytes, severity: Severity, flags: int = 0
) -> None:
    """Inject a record and give the kernel time to read it."""
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
    """Inject a memory error at a physical address."""
    inject(machine, MEMORY, memory(address, dimm=dimm), severity, flags)
