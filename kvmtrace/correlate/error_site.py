"""One place of which hardware reported errors, and what a report shows of its place.

A report is joined to a page by its address. How exact that is, MCi_MISC's low six bits show (the
address' least significant valid bit) where MCi_STATUS declares them valid, or an EDAC report's
grain; at best it is one page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from kvmtrace import dimm_names, kvm
from kvmtrace.correlate.error_counts import EDAC, ErrorCount, together
from kvmtrace.correlate.timeline import RunningEntry
from kvmtrace.events import HwError, MachineCheck
from kvmtrace.facts import EntryKind, Join, JoinedBy, TimelineEntry
from kvmtrace.linux import mce
from kvmtrace.model import ErrorHistory, Reported

_SEVERITIES = ("corrected", "deferred", "recoverable", "fatal")

# Less exact reports (of a whole rank or channel) name no page.
MAX_SHIFT = 30
MAX_REPORTERS = 8
_LINE = 64  # bytes that a controller corrects at once; an address without a grain is as exact
_PAGE = 4096  # bytes in the smallest page
_LINES = (64 << 10) // _LINE  # in the largest page

# The label in recordings of kvmtrace 0.1 for a handle that SMBIOS does not list.
_NO_HANDLE = re.compile("SMBIOS handle 0x[0-9a-f]+")

# The best source of names first: EDAC has the slot, firmware's tables what the board calls it.
_SOURCES = ("edac", "smbios", "fru")


class Name(NamedTuple):
    """What a report calls the memory at ``addr``.

    ``rank``: lower is better; names of one DIMM come before others, then by ``_SOURCES``.
    ``corrected``: the error was, or may have been, corrected. ``lines``: a bit for each cache line
    of the page for which the name was reported.
    """

    label: str
    rank: tuple[bool, int]
    ts: int
    addr: int | None = None
    corrected: bool = True
    lines: int = 0

    def same_error(self, other: Name) -> bool:
        """Whether ``other`` is another reporter's name for the same error; both are of one place.

        Controllers interleave within a page, so another address may be of another DIMM. Firmware
        may have only the page; then it reports at the same time.
        """
        if self.addr is None or other.addr is None or self.rank[1] == other.rank[1]:
            return False
        if self.lines and other.lines:
            return bool(self.lines & other.lines)
        return together(self.ts, other.ts)

    def is_for(self, ts: int, line: int | None) -> bool | None:
        """Whether it names the DIMM of an uncorrected error at ``ts`` in ``line``, if known."""
        if not self.corrected:
            return True
        if line is None or not self.lines:
            return together(self.ts, ts) or None
        return bool(self.lines & line)


@dataclass(slots=True)
class ErrorSite:
    """What was reported of one place: 2**``order`` pages, of which ``pfn`` is one.

    ``named``: errors by the label that their reports have. ``entries``: the timeline, by what two
    reports of one entry have in common. ``uncorrected``: time and cache line (a bit) of the last
    uncorrected error.
    """

    pfn: int
    order: int = 0
    page_shift: int = kvm.PAGE_SHIFT
    errors: ErrorCount = field(default_factory=ErrorCount)
    named: dict[str, ErrorCount] = field(default_factory=dict)
    names: dict[str, Name] = field(default_factory=dict)
    vias: dict[str, None] = field(default_factory=dict)
    first_ts: int = 0
    last_ts: int = 0
    facts: dict[str, int | str] = field(default_factory=dict)
    entries: dict[tuple[object, ...], RunningEntry] = field(default_factory=dict)
    uncorrected: tuple[int, int | None] | None = None
    _reported: Reported | None = None  # what reported() returned, if nothing was added since

    def add(self, event: HwError) -> None:
        self._reported = None
        facts = _facts(event)
        via, severity = event.via, event.severity
        if not self.vias:
            self.first_ts = self.last_ts = event.ts
        elif via not in self.vias and len(self.vias) >= MAX_REPORTERS:
            via = "others"
        self.vias[via] = None
        self.first_ts = min(self.first_ts, event.ts)
        self.last_ts = max(self.last_ts, event.ts)
        self.errors.add(event, severity)
        if _is_uncorrected(severity):
            line, last = line_of(event), self.uncorrected
            if line is None and last and together(event.ts, last[0]):
                line = last[1]  # another report of the same error
            self.uncorrected = event.ts, line
        # The last report of the worst severity counts; others add what it does not have.
        worse = _rank(severity) >= _rank(self.facts.get("severity"))
        self.facts = {**self.facts, **facts} if worse else {**facts, **self.facts}
        self._note(event)

    def _note(self, event: HwError) -> None:
        key = _kind_of(event)
        kind = EntryKind.HARDWARE_ERROR
        if key not in self.entries and len(self.entries) >= MAX_REPORTERS:
            key, kind = ("others",), EntryKind.MORE_HARDWARE_ERRORS
        known = self.entries.get(key)
        if known is None:
            exact = Join(JoinedBy.ADDRESS, 1 << self.page_shift << self.order)
            join = exact if self.order else Join(JoinedBy.PAGE_ADDRESS)
            self.entries[key] = RunningEntry(
                TimelineEntry(
                    event.ts,
                    kind,
                    event if kind is EntryKind.HARDWARE_ERROR else None,
                    join,
                    count=max(1, event.count),
                    last_ts=event.ts,
                )
            )
        else:
            known.add(event.ts, max(1, event.count))

    def add_name(self, name: Name) -> None:
        """Add a name that a report has for the memory."""
        self._reported = None
        known = self.names.get(name.label)
        if known is None and len(self.names) >= MAX_REPORTERS:
            return
        if known is not None:
            lines = known.lines | name.lines
            if (known.corrected, known.rank) < (name.corrected, name.rank):
                self.names[name.label] = known._replace(lines=lines)
                return
            del self.names[name.label]
            name = name._replace(lines=lines)
        self.names[name.label] = name

    def covers(self, pfn: int) -> bool:
        """Whether the page is within this place."""
        return pfn >> self.order == self.pfn >> self.order

    def reported(self) -> Reported:
        """Immutable counts and the best name."""
        if self._reported is None:
            best = best_name([self])
            self._reported = Reported(self.history(), best.label if best else None)
        return self._reported

    def history(self) -> ErrorHistory:
        corrected, others = self.errors.errors
        return ErrorHistory(corrected + others, corrected, self.first_ts, self.last_ts)


def best_name(sites: list[ErrorSite]) -> Name | None:
    """The best name of the most exact place; the last of equals.

    The cache lines of a page are on several DIMMs. The name of an uncorrected error comes before
    those of corrected ones, and a name that is known to be of another line is left out.
    """
    names = [name for site in sites for name in reversed(site.names.values())]
    bad = [site.uncorrected for site in sites if site.uncorrected]
    if not bad:
        return min(names, key=lambda name: name.rank, default=None)
    found: list[tuple[bool, tuple[bool, int], Name]] = []
    for name in names:
        fits = {name.is_for(*error) for error in bad}
        if fits != {False}:
            found.append((True not in fits, name.rank, name))
    return min(found, key=lambda one: one[:2])[2] if found else None


def place_of(event: HwError, page_shift: int = kvm.PAGE_SHIFT) -> tuple[int, int] | None:
    """Return (pfn, order) of the place that a report names; None without a usable address."""
    pfn = event.pfn
    if event.check:
        pfn = pfn if _usable(event.addr, event.check) else None
    elif pfn is None and event.addr is not None:
        pfn = event.addr >> page_shift
    grain = (event.grain - 1).bit_length() if event.grain else page_shift
    order = max(0, grain - page_shift)
    return None if pfn is None or order > MAX_SHIFT - page_shift else (pfn, order)


def _usable(addr: int | None, check: MachineCheck) -> bool:
    """Whether the pfn is valid: older recordings have one for any address in a register."""
    if check.vendor is None or addr is None or not check.status & mce.ADDRV:
        return True
    registers = (addr, check.status, check.misc, check.vendor, None)
    return mce.physical(*registers, bank=check.bank, ipid=check.ipid) is not None


def name_of(event: HwError) -> Name | None:
    """The name that a report has for the memory; recordings also hold texts that are no name."""
    label = dimm_names.label(event.label)
    source = event.label_from or ("edac" if event.via == EDAC else "smbios")
    if label is None or _NO_HANDLE.fullmatch(label):
        return None
    order = _SOURCES.index(source) if source in _SOURCES else len(_SOURCES)
    rank = (dimm_names.names(label) != "dimm", order)
    corrected = not _is_uncorrected(event.severity)
    if event.check:
        return Name(label, rank, event.ts, corrected=corrected)
    line = line_of(event) or 0
    return Name(label, rank, event.ts, event.addr, corrected, line)


def _is_uncorrected(severity: str | None) -> bool:
    return severity not in (None, "corrected")


def line_of(event: HwError) -> int | None:
    """The bit of the cache line in its page; None if the report is less exact."""
    if event.addr is None:
        return None
    # Without a grain: firmware that has only the page gives its start.
    exact = event.grain <= _LINE if event.grain else event.addr % _PAGE != 0
    return 1 << event.addr // _LINE % _LINES if exact else None


def _kind_of(event: HwError) -> tuple[object, ...]:
    """What two reports of one timeline entry have in common."""
    severity, check = event.severity, event.check
    if check is None:
        return severity, event.via, dimm_names.label(event.label)
    if check.bank == mce.FIRMWARE_BANK:
        return severity, check.bank
    return severity, _at(check), check.bank, check.cpu, check.socket


def _at(check: MachineCheck) -> str | None:
    return mce.at(check.status, check.vendor, check.bank, check.ipid)


def _rank(severity: object) -> int:
    return _SEVERITIES.index(severity) if severity in _SEVERITIES else -1


def _facts(event: HwError) -> dict[str, int | str]:
    """The fields of an ``Origin`` that a report fills."""
    facts: dict[str, int | str | None] = {
        "severity": event.severity,
        "addr": event.addr,
        "socket": event.socket,
        "node": event.node,
        "message": event.message,
    }
    check = event.check
    if check is not None and check.bank != mce.FIRMWARE_BANK:
        facts.update(bank=check.bank, cpu=check.cpu, status=check.status)
        if _at(check) == "consumer":
            facts.update(consumer_cpu=check.cpu, consumer_socket=check.socket)
    return {name: value for name, value in facts.items() if value is not None and value != ""}
