"""Read EDAC's counters of memory errors (Documentation/ABI/testing/sysfs-devices-edac)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvmtrace.linux.read import read_text
from kvmtrace.sanitize import clean

_MAX = 4096  # memory controllers and DIMMs, together
_MAX_TEXT = 128


@dataclass(frozen=True, slots=True)
class EdacCount:
    """Errors since the driver was loaded, of a controller ("mc0") or a DIMM ("mc0/dimm3").

    ``name``: the driver's for a controller, the label of a DIMM. Unknown is None.
    """

    place: str
    name: str | None
    corrected: int | None
    uncorrected: int | None
    location: str | None = None


def counts(sys: str = "/sys") -> tuple[EdacCount, ...]:
    """Return all counters; () without a driver for this memory."""
    found = []
    for count in _counts(Path(sys, "devices/system/edac/mc")):
        found.append(count)
        if len(found) == _MAX:
            break
    return tuple(found)


def _counts(root: Path) -> Iterator[EdacCount]:
    for controller in _numbered(root, "mc"):
        # Errors that no DIMM is known for count here, and not below.
        yield EdacCount(
            controller.name,
            _text(controller / "mc_name"),
            _number(controller / "ce_count"),
            _number(controller / "ue_count"),
        )
        for kind in ("dimm", "rank"):
            for dimm in _numbered(controller, kind):
                yield EdacCount(
                    f"{controller.name}/{dimm.name}",
                    _text(dimm / "dimm_label"),
                    _number(dimm / "dimm_ce_count"),
                    _number(dimm / "dimm_ue_count"),
                    _text(dimm / "dimm_location"),
                )


def _numbered(parent: Path, kind: str) -> list[Path]:
    try:
        found = [one for one in parent.iterdir() if re.fullmatch(rf"{kind}\d{{1,6}}", one.name)]
    except OSError:
        return []
    return sorted(found, key=lambda one: int(one.name[len(kind) :]))


def _text(path: Path) -> str | None:
    return clean(read_text(str(path), 4096).strip(), _MAX_TEXT) or None


def _number(path: Path) -> int | None:
    text = read_text(str(path), 64).strip()
    return int(text) if re.fullmatch(r"\d{1,20}", text, re.ASCII) else None
