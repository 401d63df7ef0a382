"""The columns of the VM and incident tables, for ``top``, ``top --once`` and the landing page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmtrace.model import CAUSES
from kvmtrace.views.format import UNKNOWN, age_of, cells, clip, hex_of, rate_of, span_of, style_of
from kvmtrace.views.tables.grid import Column
from kvmtrace.views.tables.rows import (
    KERNEL_ITSELF,
    IncidentRow,
    VmRow,
    owners_name,
)

_BOTH = len("Recovered: dirty")
_AGO = len("99 min ago")
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
    owners = row.incident.owners
    if not owners:
        who = KERNEL_ITSELF if row.incident.host_at_risk else UNKNOWN
        return who if width is None else clip(who, width)
    name = owners_name(row.incident, row.vms, owners[0].vm)
    more = f" +{len(owners) - 1}" if len(owners) > 1 else ""
    place = f" {hex_of(owners[0].gfn)}{more}"
    return name + place if width is None else clip(name, max(1, width - len(place))) + place


def _all_owners(row: IncidentRow) -> str:
    named = ((owners_name(row.incident, row.vms, one.vm), one.gfn) for one in row.incident.owners)
    owners = ", ".join(f"{name} {hex_of(gfn)}" for name, gfn in named)
    return owners or _owner(row, None)


def _dimm(row: IncidentRow) -> str:
    origin = row.incident.origin
    return (origin.label if origin else None) or UNKNOWN


def _errno(row: VmRow, errno: str) -> int:
    return row.vm.exits_by_errno().get(errno, 0)


def _others(row: VmRow) -> int:
    exits = row.vm.exits_by_errno()
    return sum(n for errno, n in exits.items() if errno not in ("EHWPOISON", "EFAULT"))


def _vm_style(row: VmRow, style: str = "") -> str:
    return "dim" if row.vm.gone else style


def _urgency_style(row: IncidentRow) -> str:
    return style_of(row.urgency)


def _closed(row: IncidentRow) -> str:
    return "dim" if row.incident.state == "closed" else ""


def _vm_count(
    name: str, count: Callable[[VmRow], int], style: str = "", **options: Any
) -> Column[VmRow]:
    return Column(
        name,
        lambda row, width: str(count(row)),
        count,
        lambda row: _vm_style(row, style if count(row) else ""),
        **options,
    )


VM_COLUMNS: tuple[Column[VmRow], ...] = (
    Column(
        "VM",
        _name,
        lambda row: row.vm.label.casefold(),
        _vm_style,
        right=False,
        falling=False,
        least=12,
        floor=8,
    ),
    Column(
        "PID", lambda row, width: str(row.vm.pid), lambda row: row.vm.pid, _vm_style, falling=False
    ),
    Column(
        "VMM",
        lambda row, width: row.vm.vmm or UNKNOWN,
        lambda row: row.vm.vmm or "",
        _vm_style,
        right=False,
        falling=False,
        drop=9,
    ),
    _vm_count("EHWPOISON", lambda row: _errno(row, "EHWPOISON"), "bad"),
    _vm_count("EFAULT", lambda row: _errno(row, "EFAULT")),
    _vm_count("OTHER", _others, drop=8),
    Column(
        "EXITS/S",
        lambda row, width: rate_of(row.rate),
        lambda row: -1 if row.rate is None else row.rate,
        _vm_style,
        drop=5,
    ),
    _vm_count("AR", lambda row: row.vm.sigbus.get("AR", 0), "warn", drop=3, floor=3),
    _vm_count("AO", lambda row: row.vm.sigbus.get("AO", 0), "warn", drop=3, floor=3),
    Column(
        "PAGES",
        # Forgotten pages may have been replaced since, hence the "?".
        lambda row, width: f"{row.vm.poisoned_pages}{'?' if row.vm.forgotten_pages else ''}",
        lambda row: row.vm.poisoned_pages,
        lambda row: _vm_style(row, "warn" if row.vm.poisoned_pages else ""),
    ),
    Column(
        "LAST",
        lambda row, width: _ago(row, row.vm.last_ts, width),
        lambda row: row.vm.last_ts or 0,
        _vm_style,
        least=6,
        brief=True,
        floor=_AGO,
    ),
    Column(
        "CAUSES",
        _causes,
        lambda row: sum(n for (_, cause), n in row.vm.exits.items() if cause != "hwpoison"),
        _vm_style,
        right=False,
        least=12,
        drop=4,
        floor=12,
    ),
)

INCIDENT_COLUMNS: tuple[Column[IncidentRow], ...] = (
    Column(
        "INCIDENT",
        lambda row, width: row.incident.id,
        lambda row: row.id,
        _closed,
        right=False,
        falling=False,
    ),
    Column(
        "STATE",
        lambda row, width: row.urgency,
        lambda row: row.urgency.rank,
        _urgency_style,
        right=False,
        falling=False,
        floor=9,
    ),
    # Dropped first: an incident's id begins with its pfn.
    Column(
        "PFN",
        lambda row, width: hex_of(row.incident.pfn),
        lambda row: row.incident.pfn or 0,
        _closed,
        falling=False,
        drop=9,
    ),
    Column(
        "OWNER, GFN",
        _owner,
        lambda row: _owner(row, None).casefold(),
        _closed,
        right=False,
        falling=False,
        least=20,
        full=_all_owners,
    ),
    Column(
        "EXITS", lambda row, width: str(row.incident.exits), lambda row: row.incident.exits, _closed
    ),
    Column(
        "SIGBUS",
        lambda row, width: str(row.incident.sigbus),
        lambda row: row.incident.sigbus,
        _closed,
    ),
    Column(
        "LATENCY",
        lambda row, width: span_of(row.latency),
        lambda row: -1 if row.latency is None else row.latency,
        _closed,
        drop=7,
    ),
    Column(
        "LAST",
        lambda row, width: _ago(row, row.last_ts, width),
        lambda row: row.last_ts or 0,
        _closed,
        least=6,
        brief=True,
        floor=_AGO,
    ),
    Column(
        "VERDICT",
        lambda row, width: row.incident.verdict or UNKNOWN,
        lambda row: row.incident.verdict or "",
        lambda row: _urgency_style(row) if row.incident.verdict else _closed(row),
        right=False,
        falling=False,
        drop=3,
    ),
    Column(
        "DIMM",
        lambda row, width: _dimm(row),
        _dimm,
        _closed,
        right=False,
        falling=False,
        least=6,
        drop=8,
    ),
    Column(
        "RESULT: PAGE",
        _result,
        lambda row: _result(row, None),
        _closed,
        right=False,
        falling=False,
        least=9,
        drop=4,
    ),
)
