"""The table of probes: where each is attached, or why not and what is not seen without it."""

from __future__ import annotations

from dataclasses import dataclass

from kvmtrace.model import Snapshot
from kvmtrace.probes import Probe, specs
from kvmtrace.views.format import UNKNOWN
from kvmtrace.views.tables.grid import Column, text_column


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """A row of the probe table. ``without``: what is not seen if it is not attached."""

    probe: Probe
    without: str | None
    runs: int | None

    @property
    def id(self) -> str:
        return self.probe.name

    @property
    def where(self) -> str:
        """Where it is attached, or why not."""
        if not self.probe.attached:
            return self.probe.why or "reason unknown"
        via = f" by {self.probe.via}" if self.probe.via else ""
        return f"{self.probe.target or UNKNOWN}{via}"


def probe_rows(snapshot: Snapshot) -> list[ProbeRow]:
    """Those that are not attached first, else in the order of the source."""
    without = {spec.name: spec.without for spec in specs()}
    rows = [
        ProbeRow(
            probe,
            without.get(probe.name),
            snapshot.probe_runs[probe.name].runs if probe.name in snapshot.probe_runs else None,
        )
        for probe in snapshot.probes
    ]
    return sorted(rows, key=lambda row: row.probe.attached)


PROBE_COLUMNS: tuple[Column[ProbeRow], ...] = (
    text_column("PROBE", lambda row, width: row.id, lambda row: row.id, key="n"),
    text_column(
        "STATE",
        lambda row, width: "attached" if row.probe.attached else "missing",
        lambda row: row.probe.attached,
        lambda row: "" if row.probe.attached else "warn",
    ),
    Column(
        "RUNS",
        lambda row, width: UNKNOWN if row.runs is None else str(row.runs),
        lambda row: row.runs or 0,
        lambda row: "" if row.runs else "dim",
        drop=2,
        key="r",
    ),
    text_column(
        "WHERE, OR WHY NOT",
        lambda row, width: row.where,
        lambda row: row.where,
        lambda row: "dim" if row.probe.attached else "",
        least=12,
        drop=3,
    ),
    text_column(
        "SHOWS",
        lambda row, width: row.without or UNKNOWN,
        lambda row: row.without or "",
        lambda row: "dim" if row.probe.attached else "warn",
        least=12,
        drop=1,
    ),
)
