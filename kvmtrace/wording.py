"""Small parts of sentences that judgement and views share: numbers, lists, names of DIMMs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvmtrace import dimm_names

UNKNOWN = "-"


def hex_of(number: int | None) -> str:
    """``0x1f000``; "-" if unknown."""
    return UNKNOWN if number is None else hex(number)


def listed(parts: Iterable[str], none: str = UNKNOWN) -> str:
    """``a, b, c``."""
    return ", ".join(parts) or none


def some_of(parts: Sequence[str], most: int, none: str = UNKNOWN) -> str:
    """``a, b and 3 more``: the first ``most``, and how many others there are."""
    more = len(parts) - most
    return listed(parts[:most], none) + (f" and {more} more" if more > 0 else "")


def counted(number: int, what: str) -> str:
    """``1 exit``, ``2 exits``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def dimm_of(label: str) -> str:
    """``"A1"`` → ``"DIMM A1"``; labels that contain what they name are left as they are."""
    match dimm_names.names(label):
        case "candidates":
            return f"one of {listed(map(dimm_of, dimm_names.candidates(label)))}"
        case "dimm":
            return label if "dimm" in label.lower() else f"DIMM {label}"
        case kind:
            return f"{kind} {label}"
