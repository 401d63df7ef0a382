"""One thing to do about an incident, as data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto

from kvmtrace.model import VmIdentity

MOST_CELLS = 30
"""The cells that ``Action.brief`` fits into."""


class ActionKind(StrEnum):
    """What to do."""

    STOP_AND_START = auto()
    MOVE_AWAY = auto()  # the VMs of a host
    REBOOT_HOST = auto()
    WAIT = auto()  # and look again
    CHECK = auto()  # whether a VM works
    SHUT_DOWN = auto()  # a VM, from inside its guest
    RESET = auto()  # a VM, so that another page is put in place
    CLEAR_DEVICE = auto()
    FREE_HUGE_PAGE = auto()
    FIND_OWNER = auto()
    READ_LOG = auto()
    REPLACE_DIMM = auto()
    FIND_DIMM = auto()
    WATCH_DIMM = auto()
    NOTHING = auto()


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do. Actions with one ``text`` are one step: of several VMs, or in one sentence.

    ``vm``: None for the host. ``text``: a sentence, which has the reason. ``brief``: the same in
    ``MOST_CELLS``. ``commands``: lines for a shell, quoted; ``how``: by what and on which condition
    they work, "" without either. ``never``: what not to do until then, with the reason.
    """

    kind: ActionKind
    vm: VmIdentity | None
    text: str
    brief: str
    reason: str
    commands: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    how: str = ""


def host_action(
    kind: ActionKind, do: str, brief: str, why: str, lines: tuple[str, ...] = ()
) -> Action:
    """An action for the host: what to ``do``, and why."""
    return Action(kind, None, f"{do}: {why}", brief, why, lines)
