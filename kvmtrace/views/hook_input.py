"""What a hook gets of a change: JSON on stdin, and variables for a shell."""

from __future__ import annotations

import json
from collections import Counter

from kvmtrace.judgement.urgency import Level, urgency_of
from kvmtrace.model import IncidentStatus, Snapshot
from kvmtrace.views import json_output
from kvmtrace.views.incident_log import Change, LogEntry
from kvmtrace.views.json_output import known, rfc3339

FORMAT = 1
"""Of the JSON; further fields do not change it."""


def is_wanted(change: Change) -> bool:
    """Whether a hook runs: not for what was over before watching began."""
    if change.incident is None or not change.at_start:
        return True
    return urgency_of(change.incident).level != Level.OVER


def hook_input(entry: LogEntry, change: Change, snapshot: Snapshot, wall: int) -> bytes:
    """One JSON object, a line in UTF-8. ``wall``: nanoseconds since the epoch."""
    incident, before, host = change.incident, change.before, snapshot.host
    facts = known(
        kvmtrace_hook=FORMAT,
        ts=rfc3339(wall),
        host=known(name=host.name, kernel=host.kernel) if host else None,
        change=_kind(change),
        at_start=change.at_start or None,
        message=entry.message,
        before=known(urgency=before.urgency, state=before.state, verdict=before.verdict)
        if before
        else None,
    )
    if incident is None:
        still_open = Counter(
            str(urgency_of(one)) for one in snapshot.incidents if one.state != IncidentStatus.CLOSED
        )
        facts |= {"changes": change.count, "open": dict(still_open)}
    else:
        facts["incident"] = json_output.incident(incident, snapshot)
    return json.dumps(facts, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def hook_variables(change: Change) -> dict[str, str]:
    """Environment variables; no text in them is a tenant's."""
    found = {"KVMTRACE_CHANGE": _kind(change)}
    if (incident := change.incident) is not None:
        found |= {
            "KVMTRACE_INCIDENT": incident.id,
            "KVMTRACE_URGENCY": str(urgency_of(incident)),
            "KVMTRACE_STATE": str(incident.state),
        }
    return found


def _kind(change: Change) -> str:
    if change.incident is None:
        return "storm"
    return "changed" if change.before else "new"
