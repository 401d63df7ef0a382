"""What a screen is of: host, version, source, time; and what may be missing on it."""

from __future__ import annotations

from dataclasses import dataclass

from kvmtrace.model import Snapshot
from kvmtrace.views.format import age_of, cells, clock_of, day_of, fold, listed, size_of, zone_of
from kvmtrace.views.not_known import kernel_difference


@dataclass(frozen=True, slots=True)
class Stamp:
    """What the whole screen is of. ``version``: of the kvmtrace that watched, None: not known.

    ``via``: where it was read from, if not from this host's kernel: ``serve, pid 144``.
    """

    version: str | None = None
    via: str | None = None

    def lines(self, snapshot: Snapshot, now: int, width: int) -> list[str]:
        """Host, kernel, version, source; time and zone."""
        what, when = listed(self._what(snapshot), ""), f"as of {moment(now, snapshot)}"
        both = listed(filter(None, (what, when)))
        if cells(both) <= width or not what:
            return [both]
        return [*fold(what, width), when]

    def _what(self, snapshot: Snapshot) -> list[str]:
        host = snapshot.host
        if host is None:
            return []
        version = f"kvmtrace {self.version}" if self.version else "kvmtrace"
        source = listed(filter(None, (host.source, self.via)))
        return [host.name, f"Linux {host.kernel}", f"{version} ({source})"]


def moment(ts: int, snapshot: Snapshot) -> str:
    """``2026-09-21 14:13:20 UTC``."""
    wall = snapshot.wall(ts)
    return f"{day_of(wall)} {clock_of(wall)} {zone_of(wall)}"


def watching_since(snapshot: Snapshot, now: int) -> str:
    """``watching since 2026-09-21 14:13:20 UTC (97 min)``."""
    since = snapshot.since
    if since is None:
        return "watching since an unknown time"
    age = age_of(since, now, snapshot.steps)
    return f"watching since {moment(since, snapshot)} ({age})"


def sees_poison(snapshot: Snapshot) -> bool:
    """Whether a page that is poisoned would be known: nothing of that was missed."""
    if snapshot.kernel is not None and snapshot.kernel.missed:
        return False
    if any(vm.forgotten_pages for vm in snapshot.vms.values() if not vm.gone):
        return False
    return all(probe.attached for probe in snapshot.probes if probe.name == "poison")


def blind_spots(snapshot: Snapshot) -> list[str]:
    """Why something may be wrong with a host, or a page, of which nothing is known."""
    missing = []
    if off := [probe.name for probe in snapshot.probes if not probe.attached]:
        missing.append(f"what these probes would show, which are not attached: {listed(off)}")
    if lost := {where: count for where, count in snapshot.lost.items() if count}:
        counts = listed(f"{count:,} at {where}" for where, count in sorted(lost.items()))
        missing.append(f"what was lost on the way: {counts}")
    if snapshot.kernel is not None and snapshot.kernel.missed:
        missing.append(f"all of the memory failures: {kernel_difference(snapshot)}")
    corrupted = snapshot.host.hardware_corrupted_bytes if snapshot.host is not None else None
    if corrupted and not snapshot.incidents:
        missing.append(f"which pages HardwareCorrupted counts: {size_of(corrupted)}")
    return missing
