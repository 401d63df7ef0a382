"""The DIMM table: what hardware reported of each, and which open incidents it is behind."""

from __future__ import annotations

from dataclasses import dataclass

from kvmtrace.events import ClockStep
from kvmtrace.model import ErrorHistory, Incident, IncidentStatus, Snapshot
from kvmtrace.views.format import UNKNOWN, age_of, dimm_of, listed
from kvmtrace.views.tables.grid import Column, text_column


@dataclass(frozen=True, slots=True)
class DimmRow:
    """A row of the DIMM table. ``vms``: the labels of the VMs that own its poisoned pages."""

    label: str
    history: ErrorHistory
    open_incidents: tuple[Incident, ...]
    vms: tuple[str, ...]
    now: int
    steps: tuple[ClockStep, ...] = ()

    @property
    def id(self) -> str:
        return self.label

    @property
    def name(self) -> str:
        """The label with a word for what it names."""
        return dimm_of(self.label)

    @property
    def worse(self) -> int:
        """Errors that were not corrected."""
        return self.history.count - self.history.corrected


def dimm_rows(snapshot: Snapshot, now: int) -> list[DimmRow]:
    """The DIMMs with most open incidents, most uncorrected and most errors first."""
    open_by_label: dict[str, list[Incident]] = {}
    for incident in snapshot.incidents:
        label = incident.origin.label if incident.origin else None
        if label and incident.state != IncidentStatus.CLOSED:
            open_by_label.setdefault(label, []).append(incident)
    rows = [
        DimmRow(
            label,
            history,
            tuple(found := open_by_label.get(label, [])),
            _vms(found, snapshot),
            now,
            snapshot.steps,
        )
        for label, history in snapshot.dimms.items()
    ]
    return sorted(rows, key=lambda r: (-len(r.open_incidents), -r.worse, -r.history.count, r.label))


def _vms(incidents: list[Incident], snapshot: Snapshot) -> tuple[str, ...]:
    keys = dict.fromkeys(owner.vm for one in incidents for owner in one.owners)
    return tuple(snapshot.vms[key].label for key in keys if key in snapshot.vms)


def _zero(count: int, style: str = "") -> str:
    return style if count else "dim"


DIMM_COLUMNS: tuple[Column[DimmRow], ...] = (
    text_column(
        "DIMM", lambda row, width: row.name, lambda row: row.label.casefold(), least=12, key="d"
    ),
    Column(
        "UNCORRECTED",
        lambda row, width: str(row.worse),
        lambda row: row.worse,
        lambda row: _zero(row.worse, "warn"),
        drop=4,
        key="n",
    ),
    Column(
        "CORRECTED",
        lambda row, width: str(row.history.corrected),
        lambda row: row.history.corrected,
        lambda row: _zero(row.history.corrected),
        drop=5,
        key="c",
    ),
    Column(
        "OPEN",
        lambda row, width: str(len(row.open_incidents)),
        lambda row: len(row.open_incidents),
        lambda row: _zero(len(row.open_incidents), "warn"),
        drop=2,
        key="o",
    ),
    Column(
        "FIRST",
        lambda row, width: age_of(row.history.first_ts, row.now, row.steps),
        lambda row: row.history.first_ts,
        drop=7,
    ),
    Column(
        "LAST",
        lambda row, width: age_of(row.history.last_ts, row.now, row.steps),
        lambda row: row.history.last_ts,
        drop=3,
        key="t",
    ),
    text_column(
        "VMS",
        lambda row, width: listed(row.vms, UNKNOWN),
        lambda row: listed(row.vms).casefold(),
        least=8,
        drop=6,
        key="v",
    ),
)
