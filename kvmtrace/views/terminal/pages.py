"""The pages behind the tables: the whole story of a row, and the help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kvmtrace.judgement.urgency import Level, Urgency, urgency_of
from kvmtrace.model import Incident, Snapshot, Vm
from kvmtrace.views.explain import WIDTH, Showing
from kvmtrace.views.explain import story as incident_story
from kvmtrace.views.format import (
    UNKNOWN,
    Line,
    age_of,
    date_of,
    hex_of,
    listed,
    rate_of,
    refusals_of,
    span_of,
    style_of,
)
from kvmtrace.views.tables.rows import incident_rows
from kvmtrace.views.terminal import detail
from kvmtrace.views.terminal.ui_state import UiState

_LABEL = 18

_MEANING = {
    Urgency.LOOPING: "the VMM is notified of the same page again and again and does not recover",
    Urgency.STOPPED: "a vCPU that was notified no longer runs",
    Urgency.UNDELIVERED: "guest_memfd refused the page to the guest, and no VMM was notified",
    Urgency.KERNEL: "the kernel itself uses the page, or may: the host is at risk",
    Urgency.UNCLEAR: "a VMM was notified, and what it did is not known, or not yet",
    Urgency.LATENT: "a VM has the page, and its VMM was not notified: the guest can still touch it",
    Urgency.UNOWNED: "no VM is known to have the page",
    Urgency.HANDLED: "each VMM that was notified dealt with it: the VM runs on without the page",
    Urgency.CLOSED: "the VM is gone, or the page is no longer poisoned",
}
_LEVELS = {
    Level.NOW: "act now",
    Level.SOON: "act soon",
    Level.WATCH: "watch",
    Level.OVER: "over",
}
_VERDICTS = (
    ("looping", "it goes back to the page again and again, and does nothing else"),
    ("stopped", "the vCPU that was notified no longer runs: the VM hangs or stands still"),
    ("unknown", "not enough was seen, or it was notified only just now"),
    ("exited", "the VM ended after it was notified"),
    ("handled", "the VM runs on; the page was replaced, or its guest avoids it"),
)
_DELIVERIES = (
    ("EHWPOISON", "KVM_RUN returned it to the VMM: the guest accessed the page"),
    ("AR", "SIGBUS, action required: a thread accessed the page and cannot go on"),
    ("AO", "SIGBUS, action optional: a page was lost that nobody is accessing right now"),
    ("not notified", "the guest was refused the page, and its VMM was not notified"),
    ("PAGES", "poisoned pages that the VM has now; with a ?, some may have been replaced since"),
)
_LOST = (
    ("lost", "events that were not seen, counted where they were lost: numbers may be too low"),
    ("not attached", "a probe that this kernel lacks; the tab Probes shows what is not seen"),
)
_CAUSES = (
    ("hwpoison", "EHWPOISON: the page is poisoned"),
    ("conversion", "private where it is shared, or the reverse: normal in confidential VMs"),
    ("userfault", "EFAULT for a page that the VMM has to provide: demand paging, normal"),
    ("backing", "guest_memfd could not provide the page: gone, unbound, out of memory"),
    ("unannotated", "EFAULT without a memory fault's address"),
    ("other", "any other errno, or flags of unknown meaning"),
)
_KEYS = (
    ("tab ← → 1-5", "the next table, or that one"),
    ("↑ ↓ j k PgUp PgDn", "select a row; its details are below the table where there is room"),
    ("enter", "the whole story of the selected row"),
    ("a", "show what is over as well, or only what is open"),
    ("/", "show only rows that contain a text, in any column; esc shows all"),
    ("s, S", "sort by the next column of this table; the other way round"),
    ("b", "write a bundle for the ticket into the current directory"),
    ("y", "copy the story of the selected row, if the terminal takes OSC 52"),
    ("space, p", "pause and go on"),
    ("ctrl+l", "draw the screen again"),
    ("q, ctrl+c", "quit (q: from here, back)"),
)
_TAPE_KEYS = (
    ("space, p", "play and pause"),
    ("< >", "to the moment before or after, at which something happened"),
    ("- +", "play at half or twice the speed"),
)


def story(state: UiState, width: int) -> list[Line]:
    """The whole story of the row that was chosen."""
    tab, key = state.shown
    table = state.tables[tab]
    if table is state.vms:
        return vm_page(state.snapshot, key, state.now, state.vm_trends.rates)
    if table is state.incidents:
        return incident_page(state.snapshot, key, state.now)
    row = next((row for row in table.rows if row.id == key), None)
    if row is None:
        return [(("  this is no longer remembered", "warn"),)]
    return detail.lines(state, row, width)


def shown_text(state: UiState) -> list[Line]:
    """What a person looks at, for the clipboard: the page, or the story of the selected row."""
    if state.page == "help":
        return help_page(state)
    if state.page == "main":
        selected = state.table.selected
        if selected is None:
            return [(("nothing is selected", ""),)]
        state.shown = state.tab, selected.id
    return story(state, WIDTH)


def vm_page(snapshot: Snapshot, key: int, now: int, rates: Mapping[int, float]) -> list[Line]:
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
        *([_fact("not notified", refusals_of(vm.undelivered), "warn")] if vm.undelivered else []),
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
    incident = snapshot.incident(key)
    if incident is None:
        return [(("  this incident is no longer remembered", "warn"),)]
    urgency = urgency_of(incident)
    (row,) = incident_rows(replace(snapshot, incidents=(incident,)), now)
    showing = Showing(WIDTH - 2, now)
    lines = [(("  ", ""), *line) for line in incident_story(incident, snapshot, showing)]
    end = next(number for number, line in enumerate(lines) if len(line) == 1)
    return [
        *lines[:end],
        (
            (f"  {'state':<{_LABEL}}", "dim"),
            (urgency, style_of(urgency)),
            (f"  {_MEANING[urgency]}", "dim"),
        ),
        _fact("latency", f"{span_of(row.latency)} from poison to first delivery"),
        *lines[end:],
    ]


def help_page(state: UiState) -> list[Line]:
    """Keys, and what the words mean."""
    table = state.table
    by_key = {"u": table.first} | {one.key: one.name for one in table.columns if one.key}
    sorting = [(" ".join(by_key), f"sort by {listed(by_key.values())}; again: the other way round")]
    keys = [*(_TAPE_KEYS if state.tape else ()), *_KEYS]
    if state.tape:
        keys = [one for one in keys if one != ("space, p", "pause and go on")]
    states = [
        (f"{urgency}", f"{_LEVELS[urgency.level]}: {meaning}")
        for urgency, meaning in _MEANING.items()
    ]
    lines: list[Line] = []
    for title, entries in (
        ("keys", [*keys, *sorting]),
        ("STATE: what is worst of an incident, and how soon somebody must act", states),
        ("verdicts: what a VMM did after it was notified", _VERDICTS),
        ("how a VMM is notified, and counts", _DELIVERIES),
        ("what is not seen", _LOST),
        ("causes of exits", _CAUSES),
    ):
        lines.append(((f"  {title}", "title"),))
        for word, meaning in entries:
            style = style_of(Urgency(word)) if title.startswith("STATE") else ""
            lines.append(((f"  {word:<20}", style), (meaning, "dim")))
    return lines


def _fact(label: str, value: str, style: str = "") -> Line:
    return ((f"  {label:<{_LABEL}}", "dim"), (value, style))


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
