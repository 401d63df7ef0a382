"""The landing page: one snapshot as plain HTML, for people who open the exporter's port.

Self-contained (no scripts, no other files), readable on a phone, and everything that comes from
the outside is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from kvmtrace import __version__
from kvmtrace.events import Owner, elapsed
from kvmtrace.model import Incident, Snapshot, Vm
from kvmtrace.probes import Probe
from kvmtrace.views.tables.header import clock_text
from kvmtrace.views.tables.rows import KERNEL_ITSELF, severity, state_word

MAX_ROWS = 200

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .8rem; margin: 0; }
dt { opacity: .7; } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid; white-space: nowrap; }
td { border-bottom: 1px solid color-mix(in srgb, currentColor 15%, transparent); }
th.n, td.n { text-align: right; }
.bad { color: #c00; font-weight: 600; } .quiet { opacity: .7; }
@media (prefers-color-scheme: dark) { .bad { color: #ff7b72; } }
"""

# A cell is text, or (text, CSS class).
_Cell = str | tuple[str, str]
_Table = tuple[Sequence[_Cell], list[list[_Cell]]]  # heads, rows


def render(snapshot: Snapshot, now: int) -> str:
    """The page for ``snapshot`` at ``now`` (nanoseconds, by the clock of the events)."""
    return _document(
        _summary(snapshot)
        + _section("Incidents", "No poisoned page seen.", _incidents(snapshot, now))
        + _section("VMs", "No VM seen.", _vms(snapshot, now))
        + _section("Probes", "No probe.", _probes(snapshot.probes))
    )


def render_failure(reason: str) -> str:
    """The page when the source has ended."""
    return _document(f'<p class="bad">Not watching: {html.escape(reason)}</p>')


def _document(body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>kvmtrace</title><style>{_STYLE}</style></head><body>"
        f'<h1>kvmtrace <span class="quiet">{html.escape(__version__)}</span></h1>{body}'
        '<p><a href="/metrics">/metrics</a> · <a href="/-/healthy">/-/healthy</a></p>'
        "</body></html>\n"
    )


def _summary(snapshot: Snapshot) -> str:
    rows: list[tuple[str, str, str]] = []
    host = snapshot.host
    if host is not None:
        source = f"{host.source} ({host.source_why})" if host.source_why else host.source
        rows += [
            ("Host", host.name, ""),
            ("Kernel", host.kernel, ""),
            ("Source", source, ""),
        ]
        corrupted = host.hardware_corrupted_bytes
        if corrupted is not None:
            rows.append(("Hardware corrupted", _size(corrupted), "bad" if corrupted else ""))
    if snapshot.kernel_pages:
        at_risk = f"poisoned pages of the kernel's: {snapshot.kernel_pages:,}"
        rows.append(("Host at risk", at_risk, "bad"))
    if (clock := clock_text(snapshot)) is not None:
        rows.append(("Wall clock", clock, ""))
    missing = [probe.name for probe in snapshot.probes if not probe.attached]
    if missing:
        rows.append(("Not attached", ", ".join(missing), "bad"))
    lost = [f"{where} {count:,}" for where, count in snapshot.lost.items() if count]
    rows.append(("Lost", ", ".join(lost) or "nothing", "bad" if lost else ""))
    return (
        "<dl>"
        + "".join(
            f"<dt>{term}</dt><dd{_class(css)}>{html.escape(value)}</dd>"
            for term, value, css in rows
        )
        + "</dl>"
    )


def _incidents(snapshot: Snapshot, now: int) -> _Table:
    heads = (
        "State",
        "pfn",
        "Page",
        "VM and gfn",
        ("Exits", "n"),
        ("SIGBUS", "n"),
        "Poisoned",
        "Last notified",
    )
    rows: list[list[_Cell]] = []
    for one in sorted(snapshot.incidents, key=_by_urgency):
        what = " · ".join(filter(None, (one.page_type, one.result))) or "not seen"
        owners = ", ".join(_owner(owner, one, snapshot) for owner in one.owners)
        owners = owners or (KERNEL_ITSELF if one.host_at_risk else "none known")
        state = state_word(one)
        rows.append(
            [
                (state, "bad" if state in ("looping", "kernel") else ""),
                "?" if one.pfn is None else f"{one.pfn:#x}",
                what,
                owners,
                (f"{one.exits:,}", "n"),
                (f"{one.sigbus:,}", "n"),
                _ago(one.poisoned_ts, now, snapshot),
                _ago(one.last_delivery_ts, now, snapshot),
            ]
        )
    return heads, rows


def _by_urgency(incident: Incident) -> tuple[int, int]:
    latest = max(incident.poisoned_ts or 0, incident.last_delivery_ts or 0)
    return severity(incident), -latest


def _owner(owner: Owner, incident: Incident, snapshot: Snapshot) -> str:
    vm = snapshot.vms.get(owner.vm) or incident.vm_identities.get(owner.vm)
    name = vm.label if vm is not None else "a VM not known by name"
    return name if owner.gfn is None else f"{name} {owner.gfn:#x}"


def _vms(snapshot: Snapshot, now: int) -> _Table:
    heads = ("VM", ("pid", "n"), "VMM", "Exits", "SIGBUS", ("Poisoned pages", "n"), "Last event")
    rows: list[list[_Cell]] = []
    for vm in sorted(snapshot.vms.values(), key=_by_trouble):
        exits = ", ".join(
            f"{errno} {cause or 'unknown'} {count:,}"
            for (errno, cause), count in sorted(vm.exits.items(), key=lambda item: -item[1])
        )
        sigbus = ", ".join(f"{code} {count:,}" for code, count in sorted(vm.sigbus.items()))
        rows.append(
            [
                f"{vm.label} (gone)" if vm.gone else vm.label,
                (str(vm.pid), "n"),
                vm.vmm or "",
                exits or "none",
                sigbus or "none",
                (f"{vm.poisoned_pages:,}", "n bad" if vm.poisoned_pages else "n"),
                _ago(vm.last_ts, now, snapshot),
            ]
        )
    return heads, rows


def _by_trouble(vm: Vm) -> tuple[bool, int, int, int]:
    return vm.gone, -vm.poisoned_pages, -(vm.last_ts or 0), vm.key


def _probes(probes: Iterable[Probe]) -> _Table:
    return ("Probe", "Attached to", "Way", "Why not"), [
        [
            probe.name,
            (probe.target or "", "") if probe.attached else ("not attached", "bad"),
            probe.via or "",
            probe.why or "",
        ]
        for probe in probes
    ]


def _section(title: str, empty: str, table: _Table) -> str:
    heads, rows = table
    if not rows:
        return f"<h2>{title}</h2><p>{empty}</p>"
    more = len(rows) - MAX_ROWS
    note = f"<p>… and {more:,} more</p>" if more > 0 else ""
    head = "".join(_cell(cell, "th") for cell in heads)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows[:MAX_ROWS])
    return (
        f'<h2>{title}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _cell(cell: _Cell, tag: str = "td") -> str:
    value, css = (cell, "") if isinstance(cell, str) else cell
    return f"<{tag}{_class(css)}>{html.escape(value)}</{tag}>"


def _class(css: str) -> str:
    return f' class="{css}"' if css else ""


def _ago(ts: int | None, now: int, snapshot: Snapshot) -> str:
    if ts is None:
        return "—"
    seconds = max(0, elapsed(ts, now, snapshot.steps)) // 1_000_000_000
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def _size(size: int) -> str:
    return f"{size:,} B" if size < 1024 else f"{size // 1024:,} KiB"
