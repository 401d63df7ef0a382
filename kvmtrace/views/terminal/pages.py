"""The pages behind the tables: details of one VM or one incident, and the help."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from kvmtrace.judgement.urgency import Urgency, urgency_of
from kvmtrace.model import Incident, Snapshot, Vm
from kvmtrace.views.explain import TITLES, WIDTH, explain_lines
from kvmtrace.views.format import (
    UNKNOWN,
    Line,
    age_of,
    cells,
    counted,
    date_of,
    hex_of,
    listed,
    plain,
    rate_of,
    span_of,
    style_of,
)
from kvmtrace.views.tables.rows import IncidentRow, incident_rows

_LABEL = 18

_STATES = {
    Urgency.LOOPING: "the VMM is notified of the same page again and again and does not recover",
    Urgency.STOPPED: "a vCPU that was notified of the page no longer runs",
    Urgency.UNDELIVERED: "guest_memfd refused the page to a guest, and no VMM was notified",
    Urgency.KERNEL: "the kernel itself uses the page, or may: the host is at risk",
    Urgency.UNCLEAR: "a VMM was notified, and what it did is not known",
    Urgency.LATENT: "a VM owns the page, its guest has not accessed it yet",
    Urgency.UNOWNED: "no VM is known to own the page",
    Urgency.HANDLED: "the guest runs on, or no VM has the page any more",
    Urgency.CLOSED: "the VM is gone, or the page is no longer poisoned",
}
_CAUSES = (
    ("hwpoison", "EHWPOISON: the page is poisoned"),
    ("conversion", "private where it is shared, or the reverse: normal in confidential VMs"),
    ("userfault", "EFAULT for a page that the VMM has to provide: demand paging, normal"),
    ("backing", "guest_memfd could not provide the page: gone, unbound, out of memory"),
    ("unannotated", "EFAULT without a memory fault's address"),
    ("other", "any other errno, or flags of unknown meaning"),
)
_HELP = (
    ("↑ ↓ j k, PgUp PgDn", "select a row"),
    ("tab ← →", "switch between VMs and incidents"),
    ("enter", "details of the selected row"),
    ("s, S", "sort by the next column, reverse; after the last column: by urgency"),
    ("/", "show only VMs whose name or pid contains a text; esc shows all"),
    ("p", "pause and go on"),
    ("i", "probes: where attached, what is lost without them"),
    ("ctrl+l", "draw the screen again"),
    ("q, ctrl+c", "quit (q: from here, back)"),
)


def vm_page(snapshot: Snapshot, key: int, now: int, rates: Mapping[int, float]) -> list[Line]:
    """One VM."""
    vm = snapshot.vms.get(key)
    if vm is None:
        return [(("  this VM is no longer remembered", "warn"),)]
    mine = [
        row.incident
        for row in incident_rows(snapshot, now)
        if any(owner.vm == key for owner in row.incident.owners)
    ]
    signals = listed(f"{code} {count}" for code, count in sorted(vm.sigbus.items()))
    lines = [
        ((f"  {vm.label}", "title"), ("  gone" if vm.gone else "", "warn")),
        _fact("pid", str(vm.pid)),
        *([_fact("VMID", vm.vmid)] if vm.vmid else []),
        _fact("VMM", vm.vmm or UNKNOWN),
        _fact("uuid", vm.uuid or UNKNOWN),
        *([_fact("not looked up", vm.unread, "warn")] if vm.unread else []),
        _fact("poisoned pages", str(vm.poisoned_pages), "warn" if vm.poisoned_pages else ""),
        _fact("SIGBUS", signals),
        *([_fact("not notified", _refusals(vm), "warn")] if vm.undelivered else []),
        _fact("exits/s", rate_of(rates.get(key))),
        _fact("last exit, signal", _when(vm.last_ts, now, snapshot)),
        (),
        (("  exits by errno and cause", "head"),),
        *_exits(vm),
        (),
        (("  incidents", "head"),),
        *(_brief(incident, key) for incident in mine),
    ]
    if not mine:
        lines.append((("  none", "dim"),))
    return [*lines, (), *_timeline(mine, now, snapshot)]


def incident_page(snapshot: Snapshot, key: str, now: int) -> list[Line]:
    """One incident."""
    incident = next((i for i in snapshot.incidents if i.id == key), None)
    if incident is None:
        return [(("  this incident is no longer remembered", "warn"),)]
    urgency = urgency_of(incident)
    row = IncidentRow(incident, snapshot.vms, now)
    story = explain_lines(incident, snapshot, WIDTH - 2)
    return [
        ((f"  {next(story)}", "title"),),
        (
            (f"  {'state':<{_LABEL}}", "dim"),
            (urgency, style_of(urgency)),
            (f"  {_STATES[urgency]}", "dim"),
        ),
        _fact("latency", f"{span_of(row.latency)} from poison to first delivery"),
        *(((f"  {line}" if line else "", "head" if line in TITLES else ""),) for line in story),
    ]


def help_page() -> list[Line]:
    """Keys, and what the words mean."""
    lines: list[Line] = []
    for title, entries in (
        ("keys", _HELP),
        ("states of an incident", tuple(_STATES.items())),
        ("causes", _CAUSES),
    ):
        lines.append(((f"  {title}", "title"),))
        lines += [((f"  {word:<20}", ""), (meaning, "dim")) for word, meaning in entries]
    return lines


def wrapped(line: Line, width: int) -> list[Line]:
    """A line wrapped under its second span; a line that is wrapped loses its styles."""
    text = plain(line)
    if cells(text) <= width:
        return [line]
    lead = text[: len(text) - len(text.lstrip())]
    under = cells(line[0][0]) if len(line) > 1 else len(lead) + 2
    parts = textwrap.wrap(
        text.strip(),
        max(width, 1),
        initial_indent=lead,
        subsequent_indent=" " * (under if under < width // 2 else 2),
    )
    return [((part, ""),) for part in parts]


def _fact(label: str, value: str, style: str = "") -> Line:
    return ((f"  {label:<{_LABEL}}", "dim"), (value, style))


def _refusals(vm: Vm) -> str:
    refusals = counted(vm.undelivered, "refusal")
    return f"{refusals} by guest_memfd of which KVM_RUN did not notify the VMM"


def _exits(vm: Vm) -> list[Line]:
    if not vm.exits:
        return [(("  none", "dim"),)]
    width = max(len(str(count)) for count in vm.exits.values())
    ordered = sorted(vm.exits.items(), key=lambda entry: -entry[1])
    return [
        ((f"  {errno:<12}{cause or 'cause unknown':<14}{count:>{width}}", ""),)
        for (errno, cause), count in ordered
    ]


def _brief(incident: Incident, vm: int) -> Line:
    places = listed(f"gfn {hex_of(owner.gfn)}" for owner in incident.owners if owner.vm == vm)
    counts = f"  exits {incident.exits}  SIGBUS {incident.sigbus}"
    urgency = urgency_of(incident)
    return (
        (f"  {incident.id:<12}", ""),
        (f"{urgency:<12}", style_of(urgency)),
        (f"{places}{counts}", ""),
    )


def _timeline(incidents: list[Incident], now: int, snapshot: Snapshot) -> list[Line]:
    entries: list[tuple[int, str]] = []
    for i in incidents:
        pfn = f"pfn {hex_of(i.pfn)} poisoned"
        for ts, what in (
            (i.poisoned_ts, f"{pfn}: {i.result}" if i.result else pfn),
            (i.first_delivery_ts, "first delivery"),
            (i.last_delivery_ts if i.exits + i.sigbus > 1 else None, "last delivery so far"),
        ):
            if ts is not None:
                entries.append((ts, f"{what}  ({i.id})" if len(incidents) > 1 else what))
    if not entries:
        return []
    return [
        (("  timeline, local time", "head"),),
        *(((f"  {_when(ts, now, snapshot)}  ", "dim"), (what, "")) for ts, what in sorted(entries)),
    ]


def _when(ts: int | None, now: int, snapshot: Snapshot) -> str:
    if ts is None:
        return UNKNOWN
    return f"{date_of(snapshot.wall(ts))}  {age_of(ts, now, snapshot.steps)} ago"
