"""What to do about the hardware that an error came from."""

from __future__ import annotations

from collections.abc import Iterator

from kvmtrace import dimm_names
from kvmtrace.judgement.action import Action, ActionKind, host_action
from kvmtrace.model import Incident
from kvmtrace.wording import counted, dimm_of, listed

_POSITIONS = {"rank": "that holds rank", "slot": "in slot", "channel": "on channel"}


def for_hardware(incident: Incident) -> Iterator[Action]:
    """Replace, find or watch the DIMM; nothing without a report."""
    origin = incident.origin
    if origin is None:
        return
    if not origin.label:
        if origin.addr is None or origin.severity == "corrected":
            return
        where = "" if origin.socket is None else f" of socket {origin.socket}"
        do, why = f"find the DIMM{where} that holds address {origin.addr:#x}", "no report named it"
        yield host_action(ActionKind.FIND_DIMM, do, "find the DIMM", why)
        return
    dimm = dimm_of(origin.label)
    count = origin.dimm.count if origin.dimm else origin.history.count
    errors = f"{counted(count, 'error')} reported"
    if origin.severity in ("corrected", None):  # None: firmware's and EDAC's "informational"
        why = f"{errors}, none that says it was not corrected"
        if origin.severity == "corrected":
            why = f"{errors}, those of this page were corrected"
        yield host_action(ActionKind.WATCH_DIMM, f"watch {dimm}", "watch the DIMM", why)
        return
    kind, do, why, brief = ActionKind.REPLACE_DIMM, f"replace {dimm}", errors, "replace the DIMM"
    named_by = dimm_names.names(origin.label)
    if named_by == "candidates":
        kind, brief = ActionKind.FIND_DIMM, "find out which DIMM fails"
        among = listed(dimm_names.candidates(origin.label))
        do = f"find out which DIMM fails, one of {among}"
        why = (
            f"{errors}, and EDAC does not distinguish them; change their places, one at a time,"
            " and see where errors follow"
        )
    elif dimm_names.is_position(origin.label):
        kind, brief = ActionKind.FIND_DIMM, "find the DIMM"
        do = f"find the DIMM {_POSITIONS[named_by]} {origin.label}"
        why = (
            f"{errors}; the board's manual says where controllers, channels, slots and chip"
            " selects (csrow) are"
        )
    elif named_by == "channel":
        kind, brief = ActionKind.FIND_DIMM, "look for memory without a slot"
        do = f"look for memory without a slot, {origin.label}"
        why = (
            f"{errors}; it is in the package of the processor or on the board, and is replaced"
            " with it"
        )
    yield host_action(kind, do, brief, why)
