"""How much the correlator remembers. What has no room is counted, and shown as lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvmtrace.model import MAX_INCIDENTS

CountLost = Callable[[str, int], None]
"""Counts what was lost: the place and how much."""


@dataclass(frozen=True, slots=True)
class Limits:
    """``kinds``: distinct labels of one sort (errnos, page types, refused gfns of a VM).

    ``pending``: threads and pages with events that wait for their poison; ``pending_each``: such
    events of one thread or page. ``places``: pages, and as many DIMMs, with reported errors.
    ``owners``, ``notified_vcpus``, ``timeline``: entries of one incident.
    """

    incidents: int = MAX_INCIDENTS
    gone_vms: int = 256
    departed: int = 1024
    pending: int = 1024
    pending_each: int = 64
    kinds: int = 256
    places: int = 1024
    clock_steps: int = 256
    soft_offlines: int = 256
    owners: int = 64
    notified_vcpus: int = 512
    timeline: int = 64
