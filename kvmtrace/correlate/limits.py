"""How much the correlator remembers. What has no room is counted, and shown as lost."""

from __future__ import annotations

from dataclasses import dataclass

from kvmtrace.model import MAX_INCIDENTS


@dataclass(frozen=True, slots=True)
class Limits:
    """``kinds``: distinct labels of one sort (errnos, page types, refused gfns of a VM).

    ``pending``: halves of joins that wait for the other one, and ``pending_each`` per thread or
    page. ``places``: pages, and as many DIMMs, with reported errors. ``owners``, ``told`` (vCPUs)
    and ``moments``: of one incident.
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
    told: int = 512
    moments: int = 64
