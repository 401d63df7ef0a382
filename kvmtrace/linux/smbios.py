"""Read the DIMMs from SMBIOS, and which driver passes on firmware's error reports."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from kvmtrace import dimm_names, sanitize
from kvmtrace.linux import cper

TABLE = "/firmware/dmi/tables/DMI"

# SMBIOS 3.7, 7.18: Memory Device, and the offsets of the numbers of its two names
_MEMORY_DEVICE = 17
_DEVICE_LOCATOR, _BANK_LOCATOR = 0x10, 0x11
_SIZE, _EXTENDED_SIZE, _SPEED = 0x0C, 0x1C, 0x15
_MANUFACTURER, _SERIAL, _PART = 0x17, 0x18, 0x1A
_HEADER = 4
_MAX_TEXT = 128

_T = TypeVar("_T", str, int)


@dataclass(frozen=True, slots=True)
class Firmware:
    """Names of DIMMs, and severities of firmware's reports.

    ``dimms``: {SMBIOS handle: label}, each label once. ``non_standard``: severities of
    ras:non_standard_event by number; {} if they are not known. ``alike``: names that several DIMMs
    have, as far as EDAC keeps them.
    """

    dimms: Mapping[int, str] = field(default_factory=dict)
    non_standard: Mapping[int, str] = field(default_factory=dict)
    alike: frozenset[str] = frozenset()


def read(sys: str = "/sys") -> Firmware:
    """Read this machine's."""
    # GHES and Intel's extended log number the severities of that event differently
    # (drivers/acpi/apei/ghes.c, drivers/acpi/acpi_extlog.c).
    extlog = os.path.isdir(f"{sys}/module/acpi_extlog")
    path = f"{sys}{TABLE}"
    alike = _several(name[: cper.EDAC_LABEL] for name in _names(path).values())
    return Firmware(dimm_labels(path), {} if extlog else cper.GHES, frozenset(alike))


def dimm_labels(path: str) -> dict[int, str]:
    """Return {handle: label}. DIMMs of the same name have their handles in the labels."""
    names = _names(path)
    several = _several(names.values())
    return {
        handle: f"{name} (SMBIOS handle {handle:#x})" if name in several else name
        for handle, name in names.items()
    }


@dataclass(frozen=True, slots=True)
class MemoryDevice:
    """A DIMM that is installed, as the firmware describes it. Unknown fields are None.

    ``size_bytes``: 0 is never one. ``speed``: its own, in MT/s.
    """

    handle: int
    label: str | None
    manufacturer: str | None = None
    part_number: str | None = None
    serial_number: str | None = None
    size_bytes: int | None = None
    speed: int | None = None


def memory_devices(path: str = f"/sys{TABLE}") -> tuple[MemoryDevice, ...] | None:
    """Return the DIMMs that are installed; None if the table cannot be read (only root may)."""
    try:
        table = Path(path).read_bytes()
    except OSError:
        return None
    labels = dimm_labels(path)
    found = []
    for handle, fields, strings in _structures(table):
        if fields[0] != _MEMORY_DEVICE or _number(fields, _SIZE, 2) == 0:
            continue  # an empty slot
        manufacturer, part, serial = (
            _text(fields, strings, at) for at in (_MANUFACTURER, _PART, _SERIAL)
        )
        size, speed = _size(fields), _number(fields, _SPEED, 2)
        known_speed = speed if speed not in (0, 0xFFFF) else None
        label = labels.get(handle)
        found.append(MemoryDevice(handle, label, manufacturer, part, serial, size, known_speed))
    return tuple(found)


def _text(fields: bytes, strings: list[str], at: int) -> str | None:
    """The string whose number is at this offset; None for a placeholder."""
    number = fields[at] if at < len(fields) else 0
    if not 0 < number <= len(strings):
        return None
    text = sanitize.clean(strings[number - 1], _MAX_TEXT).strip()
    # "00000000" and "FFFFFFFF" are no serial numbers.
    return text if dimm_names.label(text) and len(set(text.lower()) - set(" -")) > 1 else None


def _size(fields: bytes) -> int | None:
    size = _number(fields, _SIZE, 2)
    if size is None or size == 0xFFFF:
        return None
    if size == 0x7FFF:
        extended = _number(fields, _EXTENDED_SIZE, 4)
        return (extended & 0x7FFFFFFF) << 20 or None if extended else None
    return (size & 0x7FFF) << (10 if size & 0x8000 else 20) or None


def _number(fields: bytes, at: int, size: int) -> int | None:
    part = fields[at : at + size]
    return int.from_bytes(part, "little") if len(part) == size else None


def _several(names: Iterable[_T]) -> set[_T]:
    return {name for name, count in Counter(names).items() if count > 1}


def _names(path: str) -> dict[int, str]:
    """Return {handle: "BANK DEVICE"}, firmware's names in EDAC's form; {} if there are none.

    DIMMs that share a handle are left out.
    """
    try:
        table = Path(path).read_bytes()
    except OSError:
        return {}
    labels: dict[int, str] = {}
    devices = [one for one in _structures(table) if one[1][0] == _MEMORY_DEVICE]
    several = _several(handle for handle, _, _ in devices)
    for handle, fields, strings in devices:
        if handle in several:
            continue
        numbers = [fields[at] for at in (_BANK_LOCATOR, _DEVICE_LOCATOR) if at < len(fields)]
        names = [strings[n - 1] for n in numbers if 0 < n <= len(strings)]
        if label := " ".join(filter(None, map(dimm_names.label, names))):
            labels[handle] = label
    return labels


def _structures(table: bytes) -> Iterator[tuple[int, bytes, list[str]]]:
    """Yield (handle, bytes including the header, strings) of each structure."""
    at = 0
    while at + _HEADER <= len(table):
        length = table[at + 1]
        end = table.find(b"\0\0", at + length)
        if length < _HEADER or end < 0:
            return
        fields = table[at : at + length]
        strings = table[at + length : end].decode("latin-1").split("\0")
        yield int.from_bytes(fields[2:4], "little"), fields, strings
        at = end + 2
