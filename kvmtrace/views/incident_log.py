"""Log entries for what changes: incidents, probes, and what is lost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kvmtrace.judgement.actions import actions, named
from kvmtrace.judgement.urgency import Level, Urgency, by_urgency, urgency_of
from kvmtrace.model import HistoryState, Incident, IncidentStatus, Snapshot, VerdictWord
from kvmtrace.sanitize import clean
from kvmtrace.views.json_output import rfc3339
from kvmtrace.wording import counted, dimm_of, hex_of, listed

INCIDENT_ID = "59ab29b3b5ee449aa03098f914edc16e"
STORM_ID = "aba01dccef95403e8006cb94692f7968"
LOST_ID = "84d941918e6f40ce952bfe4423bed9db"
PROBE_ID = "73b5e5c3fb844e8cb19c274fb67b6090"
HOOK_ID = "b635303df1524464aa1103613e4b0186"
"""Message ids of the journal (``journalctl MESSAGE_ID=…``); they never change."""

BURST = 20
PERIOD_NS = 10_000_000_000
"""At most ``BURST`` entries about incidents in each period; the others become one total."""

# syslog(3): critical, warning, notice, informational
_PRIORITIES = {Level.NOW: 2, Level.SOON: 4, Level.WATCH: 5, Level.OVER: 6}
_WARNING = 4
_NAMES = 8


class Look(NamedTuple):
    """What makes an entry if it changes: counts do not."""

    urgency: Urgency
    state: IncidentStatus
    verdict: VerdictWord | None
    vms: frozenset[int]
    former_ids: tuple[str, ...]

    @classmethod
    def of(cls, incident: Incident) -> Look:
        """What an incident is like now."""
        vms = frozenset(owner.vm for owner in incident.owners)
        look = urgency_of(incident), incident.state, incident.verdict
        return cls(*look, vms, incident.former_ids)


@dataclass(frozen=True, slots=True)
class Change:
    """A change of an incident, or ``count`` further ones of any, whose incident is then None.

    ``before``: None if it is new. ``at_start``: it was there when watching began.
    """

    incident: Incident | None
    before: Look | None = None
    at_start: bool = False
    count: int = 1


@dataclass(frozen=True, slots=True)
class LogEntry:
    """An entry of the log. ``priority``: as syslog(3). ``fields``: by the journal's names.

    ``change``: None if it is not about incidents.
    """

    priority: int
    message_id: str
    message: str
    fields: Mapping[str, str] = field(default_factory=dict)
    change: Change | None = None

    def as_journal(self) -> dict[str, str]:
        """All fields of the journal's entry."""
        return {
            "MESSAGE": self.message,
            "PRIORITY": str(self.priority),
            "MESSAGE_ID": self.message_id,
            **self.fields,
        }

    def as_json(self, wall: int) -> str:
        """One line of JSON. ``wall``: nanoseconds since the epoch."""
        names = {name.lower(): value for name, value in self.as_journal().items()}
        return json.dumps({"ts": rfc3339(wall), **names, "priority": self.priority})


class IncidentLog:
    """Compares each snapshot with the one before. Memory is bounded by the snapshot's incidents."""

    def __init__(self, burst: int = BURST) -> None:
        self._burst = burst
        self._known: dict[str, Look] | None = None
        self._missing: set[str] | None = None
        self._lost: dict[str, int] = {}
        self._period_from: int | None = None
        self._written = 0
        self._held_back: Counter[Urgency] = Counter()
        self._lost_at: int | None = None

    def entries(self, snapshot: Snapshot, now: int) -> list[LogEntry]:
        """What changed since the last call, most urgent first. ``now``: nanoseconds, any epoch."""
        if self._known is None and snapshot.history is not None and snapshot.history.start:
            self._lost = dict(snapshot.history.start.lost)
        found = [*self._probes(snapshot), *self._losses(snapshot, now)]
        if self._period_from is None or now - self._period_from >= PERIOD_NS:
            found += self._total(snapshot)
            self._period_from, self._written = now, 0
        return found + list(self._incidents(snapshot))

    @property
    def waits(self) -> bool:
        """Whether a total is due at the end of the period, even if nothing happens until then."""
        return bool(self._held_back) or self._lost_at is not None

    def _incidents(self, snapshot: Snapshot) -> Iterator[LogEntry]:
        at_start, known = self._known is None, self._known or {}
        if at_start:
            known = _logged_before(snapshot.history)
        now = self._known = {one.id: Look.of(one) for one in snapshot.incidents}
        changed = [one for one in snapshot.incidents if known.get(one.id) != now[one.id]]
        for incident in by_urgency(changed):
            if self._written < self._burst:
                self._written += 1
                before = known.get(incident.id)
                was_there = before is None and (at_start or incident.before_start)
                yield _entry(snapshot, Change(incident, before, was_there))
            else:
                self._held_back[urgency_of(incident)] += 1

    def _total(self, snapshot: Snapshot) -> Iterator[LogEntry]:
        if not self._held_back:
            return
        held_back, self._held_back = self._held_back, Counter()
        open_now = Counter(
            urgency_of(one) for one in snapshot.incidents if one.state != IncidentStatus.CLOSED
        )
        count = sum(held_back.values())
        changes = counted(count, "further change")
        words = listed((f"{open_now[one]} {one}" for one in Urgency if open_now[one]), "nothing")
        worst = min(held_back, key=lambda one: one.rank)
        yield LogEntry(
            _PRIORITIES[worst.level],
            STORM_ID,
            f"{changes} of incidents were not logged one by one; open now: {words}",
            {"CHANGES": str(count)},
            Change(None, count=count),
        )

    def _losses(self, snapshot: Snapshot, now: int) -> Iterator[LogEntry]:
        more = {
            where: count - self._lost.get(where, 0)
            for where, count in sorted(snapshot.lost.items())
            if count > self._lost.get(where, 0)
        }
        if not more:
            self._lost_at = None if self._lost_at and now >= self._lost_at else self._lost_at
            return
        if self._lost_at is not None and now < self._lost_at:
            return  # logged with what is lost until then
        self._lost, self._lost_at = dict(snapshot.lost), now + PERIOD_NS
        what = listed(f"{count} at {where}" for where, count in more.items())
        yield LogEntry(
            _WARNING,
            LOST_ID,
            f"lost: {what}; counts and incidents may be incomplete",
            {"LOST": str(sum(more.values()))},
        )

    def _probes(self, snapshot: Snapshot) -> Iterator[LogEntry]:
        missing = {one.name: one.why for one in snapshot.probes if not one.attached}
        before, self._missing = self._missing, set(missing)
        if before is None:
            return  # those missing from the start are in the service's status
        for name in sorted(set(missing) - before):
            why = clean(missing[name] or "reason unknown")
            yield LogEntry(
                _WARNING,
                PROBE_ID,
                f"probe {name} is not attached: {why}",
                {"PROBE": name},
            )
        for name in sorted(before - set(missing)):
            yield LogEntry(6, PROBE_ID, f"probe {name} is attached again", {"PROBE": name})


def _logged_before(history: HistoryState | None) -> dict[str, Look]:
    """What the serve before has logged; one that was killed may have left out the last."""
    if history is None or history.start is None:
        return {}
    return {
        one.id: Look.of(one)
        for one in history.start.incidents
        if one.state == IncidentStatus.CLOSED or not history.was_cut
    }


def _entry(snapshot: Snapshot, change: Change) -> LogEntry:
    assert change.incident is not None
    urgency, incident = urgency_of(change.incident), named(change.incident, snapshot)
    first = actions(incident, snapshot)[0]
    keys = dict.fromkeys(
        [owner.vm for owner in incident.owners] + [verdict.vm for verdict in incident.verdicts]
    )
    vms = [incident.vm_identities[key] for key in keys if key in incident.vm_identities]
    names = [clean(f"{vm.label} (pid {vm.pid})") for vm in vms[:_NAMES]]
    if vms[_NAMES:]:
        names.append(f"{len(vms) - _NAMES} more")
    label = incident.origin.label if incident.origin else None
    facts = [
        *names,
        f"page {hex_of(incident.pfn)}" if incident.pfn is not None else "",
        clean(dimm_of(label)) if label else "",
        f"the same as {listed(incident.former_ids)}" if incident.former_ids else "",
    ]
    what = "" if change.before else "new, "
    message = f"incident {incident.id}: {what}{urgency}, {listed(filter(None, facts))}"
    if urgency.level != Level.OVER:
        message += f"; do: {first.brief} (kvmtrace explain {incident.id})"
    fields = {
        "INCIDENT": incident.id,
        "FORMER_INCIDENTS": " ".join(incident.former_ids),
        "URGENCY": str(urgency),
        "STATE": str(incident.state),
        "VERDICT": str(incident.verdict or ""),
        "PFN": hex_of(incident.pfn) if incident.pfn is not None else "",
        "VM_NAME": clean(vms[0].label) if vms else "",
        "VM_UUID": (vms[0].uuid or "") if vms else "",
        "VM_PID": str(vms[0].pid) if vms else "",
        "DIMM": clean(label) if label else "",
        "ACTION": first.text,
    }
    return LogEntry(
        _PRIORITIES[urgency.level],
        INCIDENT_ID,
        message,
        {name: value for name, value in fields.items() if value},
        change,
    )
