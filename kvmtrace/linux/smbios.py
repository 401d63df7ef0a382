"""What this machine's firmware says of its DIMMs, and who hands on what it reports of errors."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from kvmtrace import dimm_names
from kvmtrace.linux import cper

TABLE = "/firmware/dmi/tables/DMI"

# SMBIOS 3.7, 7.18: Memory Device, and where the numbers of its two names are
_MEMORY_DEVICE = 17
_DEVICE_LOCATOR, _BANK_LOCATOR = 0x10, 0x11
_HEADER = 4

_T = TypeVar("_T", str, int)


@dataclass(frozen=True, slots=True)
class Firmware:
    """``dimms``: {SMBIOS handle: label}, no label twice. ``non_standard``: what
    ras:non_standard_event's severities mean; {} where that is not known. ``alike``: names that
    several DIMMs have, as far as EDAC keeps them.
    """

    dimms: Mapping[int, str] = field(default_factory=dict)
    non_standard: Mapping[int, str] = field(default_factory=dict)
    alike: frozenset[str] = frozenset()


def read(sys: str = "/sys") -> Firmware:
    """Ask this machine."""
    # GHES and Intel's extended log trace that event in numbers of their own (drivers/acpi/apei/
    # ghes.c, drivers/acpi/acpi_extlog.c).
    extlog = os.path.isdir(f"{sys}/module/acpi_extlog")
    path = f"{sys}{TABLE}"
    alike = _several(name[: cper.EDAC_LABEL] for name in _names(path).values())
    return Firmware(dimm_labels(path), {} if extlog else cper.GHES, frozenset(alike))


def dimm_labels(path: str) -> dict[int, str]:
    """{handle: label}; DIMMs that firmware calls alike have their handles in the label, too."""
    names = _names(path)
    several = _several(names.values())
    return {
        handle: f"{name} (SMBIOS handle {handle:#x})" if name in several else name
        for handle, name in names.items()
    }


def _several(names: Iterable[_T]) -> set[_T]:
    return {name for name, count in Counter(names).items() if count > 1}


def _names(path: str) -> dict[int, str]:
    """{handle: "BANK DEVICE"} as firmware calls them, put as EDAC does; {} where none is listed.

    A handle that two of them have names neither.
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
    """(handle, its fields from the header on, its strings) of each structure."""
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
