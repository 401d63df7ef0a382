"""The columns of the VM and incident tables, for ``top``, ``top --once`` and the landing page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmtrace.judgement.urgency import Level
from kvmtrace.model import CAUSES
from kvmtrace.views.format import UNKNOWN, age_of, cells, clip, hex_of, rate_of, span_of, style_of
from kvmtrace.views.tables.grid import Column, text_column
from kvmtrace.views.tables.rows import KERNEL_ITSELF, IncidentRow, VmRow, owners_name

EXITS_PER_SECOND = "EXITS/S"
NOTIFICATIONS_PER_SECOND = "NOTIFIED/S"

_BOTH = len("Recovered: dirty")
_AGO = len("99 min ago")
_LABEL = 6  # of a DIMM, beside its counts
_BRIEF = {
    "conversion": "conv",
    "userfault": "uffd",
    "backing": "back",
    "unannotated": "unann",
    "unknown": "?",
}


def _name(row: VmRow, width: int | None) -> str:
    gone = " (gone)" if row.vm.gone else ""
    name = row.vm.label
    # A long name is clipped, "(gone)" is not.
    return name + gone if width is None else clip(name, width - len(gone)) + gone


def _causes(row: VmRow, width: int | None) -> str:
    # EHWPOISON has a column of its own, and one cause. Exits of unknown cause are shown.
    counts = row.vm.exits_by_cause()
    unknown = sum(count for (_, cause), count in row.vm.exits.items() if cause is None)
    named = [(c, counts[c]) for c in CAUSES if c != "hwpoison" and counts.get(c)]
    if unknown:
        named.append(("unknown", unknown))
    text = ", ".join(f"{name} {count}" for name, count in named) or UNKNOWN
    if width is None or cells(text) <= width:
        return text
    return clip(" ".join(f"{_BRIEF.get(name, name)} {count}" for name, count in named), width)


def _ago(row: VmRow | IncidentRow, ts: int | None, width: int | None) -> str:
    # By the width of the column, so that all rows look alike.
    age = age_of(ts, row.now, row.steps)
    return age if ts is None or (width is not None and width < _AGO) else f"{age} ago"


def _result(row: IncidentRow, width: int | None) -> str:
    # The result comes first: it matters more, and the kernel's page types are long.
    parts = [part for part in (row.incident.result, row.incident.page_type) if part]
    if not parts and row.incident.before_start:
        parts = ["from before"]
    text = ": ".join(parts) or UNKNOWN
    # One whole word instead of two of which one is cut.
    return text if width is None or cells(text) <= width or width > _BOTH else clip(parts[0], width)


def _owner(row: IncidentRow, width: int | None) -> str:
    incident = row.incident
    keys = list(dict.fromkeys([owner.vm for owner in incident.owners] or incident.vm_identities))
    if not keys:
        who = KERNEL_ITSELF if incident.host_at_risk else "no VM"
        return who if width is None else clip(who, width)
    name = owners_name(incident, row.vms, keys[0])
    # A long name is clipped, the number of further VMs is not.
    more = f" +{len(keys) - 1}" if len(keys) > 1 else ""
    return name + more if width is None else clip(name, max(1, width - len(more))) + more


def _all_owners(row: IncidentRow) -> str:
    named = ((owners_name(row.incident, row.vms, one.vm), one.gfn) for one in row.incident.owners)
    owners = ", ".join(f"{name} {hex_of(gfn)}" for name, gfn in named)
    return owners or _owner(row, None)


def _notified(row: IncidentRow, width: int | None) -> str:
    """How often; or by what, if it was once."""
    incident = row.incident
    count = incident.exits + incident.sigbus
    if not count:
        if incident.undelivered:
            return f"{incident.undelivered:,} refused"
        return "not yet" if incident.owners else UNKNOWN
    if count > 1:
        return f"{count:,}×"
    codes = {code for one in incident.notifications for code in one.sigbus}
    return f"SIGBUS {codes.pop()}" if len(codes) == 1 else "once"


def _rate(row: IncidentRow | VmRow, width: int | None) -> str:
    # The bars first: the number is aligned with those of other rows.
    number = rate_of(row.rate)
    return f"{row.bars} {number}" if row.bars else number


def _dimm(row: IncidentRow, width: int | None) -> str:
    """The DIMM, and how many errors of it were corrected (CE) and not (UE)."""
    origin = row.incident.origin
    if origin is None:
        return UNKNOWN
    history = origin.dimm or origin.history
    numbers = {"CE": history.corrected, "UE": history.count - history.corrected}
    counts = " ".join(f"{count} {kind}" for kind, count in numbers.items() if count)
    label = origin.label or "not named"
    if width is None:
        return f"{label}  {counts}".rstrip()
    # A long label is clipped, the numbers are not. Its end names the slot of a channel.
    room = width - cells(counts) - 1
    if not counts or room < _LABEL:
        return clip(label[::-1], width)[::-1]
    return f"{clip(label[::-1], room)[::-1]} {counts}"


def _errno(row: VmRow, errno: str) -> int:
    return row.vm.exits_by_errno().get(errno, 0)


def _others(row: VmRow) -> int:
    exits = row.vm.exits_by_errno()
    return sum(n for errno, n in exits.items() if errno not in ("EHWPOISON", "EFAULT"))


def _vm_style(row: VmRow, style: str = "") -> str:
    return "dim" if row.vm.gone else style


def _over(row: IncidentRow, style: str = "") -> str:
    return "dim" if row.urgency.level == Level.OVER else style


def _rate_style(row: IncidentRow | VmRow) -> str:
    return "" if row.rate else "dim"


def _vm_count(
    name: str, count: Callable[[VmRow], int], style: str = "", **options: Any
) -> Column[VmRow]:
    return Column(
        name,
        lambda row, width: str(count(row)),
        count,
        lambda row: _vm_style(row, style if count(row) else "dim"),
        **options,
    )


VM_COLUMNS: tuple[Column[VmRow], ...] = (
    text_column(
        "VM", _name, lambda row: row.vm.label.casefold(), _vm_style, least=12, floor=8, key="v"
    ),
    Column(
        "PID",
        lambda row, width: str(row.vm.pid),
        lambda row: row.vm.pid,
        _vm_style,
        falling=False,
        drop=6,
    ),
    text_column(
        "VMM",
        lambda row, width: row.vm.vmm or UNKNOWN,
        lambda row: row.vm.vmm or "",
        _vm_style,
        drop=10,
    ),
    _vm_count("EHWPOISON", lambda row: _errno(row, "EHWPOISON"), "bad", drop=1, key="n"),
    _vm_count("EFAULT", lambda row: _errno(row, "EFAULT"), drop=5, key="f"),
    _vm_count("OTHER", _others, drop=9, key="o"),
    Column(
        EXITS_PER_SECOND,
        _rate,
        lambda row: -1 if row.rate is None else row.rate,
        lambda row: _vm_style(row, _rate_style(row)),
        drop=7,
        key="r",
    ),
    _vm_count("AR", lambda row: row.vm.sigbus.get("AR", 0), "warn", drop=4, floor=3),
    _vm_count("AO", lambda row: row.vm.sigbus.get("AO", 0), "warn", drop=4, floor=3),
    Column(
        "PAGES",
        # Forgotten pages may have been replaced since, hence the "?".
        lambda row, width: f"{row.vm.poisoned_pages}{'?' if row.vm.forgotten_pages else ''}",
        lambda row: row.vm.poisoned_pages,
        lambda row: _vm_style(row, "warn" if row.vm.poisoned_pages else "dim"),
        drop=2,
        key="g",
    ),
    Column(
        "LAST",
        lambda row, width: _ago(row, row.vm.last_ts, width),
        lambda row: row.vm.last_ts or 0,
        _vm_style,
        least=6,
        brief=True,
        floor=_AGO,
        drop=3,
        key="t",
    ),
    Column(
        "CAUSES",
        _causes,
        lambda row: sum(n for (_, cause), n in row.vm.exits.items() if cause != "hwpoison"),
        _vm_style,
        right=False,
        least=12,
        drop=8,
        floor=12,
    ),
)

# The columns on the right go first, never the state, the VM and what to do.
INCIDENT_COLUMNS: tuple[Column[IncidentRow], ...] = (
    text_column(
        "STATE",
        lambda row, width: row.urgency if width is None else clip(row.urgency, width),
        lambda row: row.urgency.rank,
        lambda row: style_of(row.urgency),
        least=8,
        firm=11,
    ),
    text_column(
        "VM",
        _owner,
        lambda row: _owner(row, None).casefold(),
        _over,
        least=12,
        firm=28,
        full=_all_owners,
        key="v",
    ),
    # Its id begins with the pfn, and is what `explain` takes.
    text_column("INCIDENT", lambda row, width: row.incident.id, lambda row: row.id, _over, drop=2),
    Column(
        "SINCE",
        lambda row, width: age_of(row.since, row.now, row.steps),
        lambda row: row.since or 0,
        _over,
        drop=3,
        floor=6,
        full=lambda row: _ago(row, row.since, None),
        key="t",
    ),
    Column(
        "NOTIFIED",
        _notified,
        lambda row: row.incident.exits + row.incident.sigbus,
        lambda row: _over(row, "" if row.incident.exits + row.incident.sigbus else "dim"),
        drop=4,
        key="n",
    ),
    Column(
        NOTIFICATIONS_PER_SECOND,
        _rate,
        lambda row: -1 if row.rate is None else row.rate,
        lambda row: _over(row, _rate_style(row)),
        drop=6,
        key="r",
    ),
    text_column(
        "WHAT TO DO",
        lambda row, width: row.action.brief if width is None else clip(row.action.brief, width),
        lambda row: row.action.brief,
        lambda row: _over(row, "title" if row.urgency.level == Level.NOW else ""),
        least=10,
        firm=30,
        full=lambda row: row.action.text,
    ),
    text_column("DIMM", _dimm, lambda row: _dimm(row, None), _over, least=15, drop=5, key="d"),
    Column(
        "LATENCY",
        lambda row, width: span_of(row.latency),
        lambda row: -1 if row.latency is None else row.latency,
        _over,
        drop=8,
        key="l",
    ),
    text_column("RESULT: PAGE", _result, lambda row: _result(row, None), _over, least=12, drop=7),
)

# What is known only of several snapshots.
LIVE_ONLY = (EXITS_PER_SECOND, NOTIFICATIONS_PER_SECOND)
