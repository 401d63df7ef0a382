"""Where errors come from: what hardware and firmware reported, by page and by DIMM.

A report is joined to a page by its address, as exactly as the report says it is: MCi_MISC's low six
bits (the address' least significant valid bit) where MCi_STATUS declares them valid, an EDAC
report's grain; at best a page. One error is often reported several times, by several banks, by EDAC
and by firmware: ``tally`` counts errors, not reports.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from kvmtrace import dimm_names, kvm
from kvmtrace.bounded import BoundedDict
from kvmtrace.correlate.error_counts import EDAC, MCE, ErrorCount, together
from kvmtrace.events import HwError, Mce
from kvmtrace.linux import mce
from kvmtrace.model import (
    EntryKind,
    ErrorHistory,
    Join,
    JoinedBy,
    Origin,
    Reported,
    TimelineEntry,
)

_SEVERITIES = ("corrected", "deferred", "recoverable", "fatal")

# Reports that are less exact (a whole rank, a channel) name no page.
_MAX_SHIFT = 30
_MAX_REPORTERS = 8
_LINE = 64  # bytes: what a controller corrects, and an address without a grain is exact to
_PAGE = 4096  # bytes, of the smallest one
_LINES = (64 << 10) // _LINE  # in the largest page

# How recordings of kvmtrace 0.1 name the DIMM of a handle that SMBIOS does not list.
_NO_HANDLE = re.compile("SMBIOS handle 0x[0-9a-f]+")

# Whose names are better: EDAC knows the slot, firmware's tables what the board calls it.
_SOURCES = ("edac", "smbios", "fru")

_K = TypeVar("_K")
_V = TypeVar("_V")


class Name(NamedTuple):
    """What a reporter calls the memory, when, and the address it said so of. A lower ``worth`` is
    better: names of one DIMM come before others, then by ``_SOURCES``. ``corrected``: the error
    was, or may have been. ``lines``: a bit for each cache line of the page that it was said of.
    """

    label: str
    worth: tuple[bool, int]
    ts: int
    addr: int | None = None
    corrected: bool = True
    lines: int = 0

    def same_error(self, other: Name) -> bool:
        """Whether another reporter means the same error; both are of one place.

        Controllers take turns within a page, so another address may be of another DIMM; but
        firmware may know the page only, and then speaks at the same time.
        """
        if self.addr is None or other.addr is None or self.worth[1] == other.worth[1]:
            return False
        if self.lines and other.lines:
            return bool(self.lines & other.lines)
        return together(self.ts, other.ts)

    def is_for(self, ts: int, line: int | None) -> bool | None:
        """Whether it is the name for an uncorrected error then, in that line; None: not known."""
        if not self.corrected:
            return True
        if line is None or not self.lines:
            return together(self.ts, ts) or None
        return bool(self.lines & line)


@dataclass(slots=True)
class ErrorSite:
    """What was reported of one place: 2**``order`` pages from ``pfn`` on."""

    pfn: int
    order: int = 0
    page_shift: int = kvm.PAGE_SHIFT
    tally: ErrorCount = field(default_factory=ErrorCount)
    named: dict[str, ErrorCount] = field(default_factory=dict)  # by label: reports that have it
    names: dict[str, Name] = field(default_factory=dict)
    vias: dict[str, None] = field(default_factory=dict)
    first_ts: int = 0
    last_ts: int = 0
    facts: dict[str, int | str] = field(default_factory=dict)
    moments: dict[tuple[object, ...], TimelineEntry] = field(default_factory=dict)
    uncorrected: tuple[int, int | None] | None = None  # the last one: time, line's bit
    _reported: Reported | None = None  # as it was frozen last, if nothing came since

    def add(self, event: Mce | HwError) -> None:
        """One more report."""
        self._reported = None
        facts = _facts(event)
        via, severity = _via(event), severity_of(event)
        if not self.vias:
            self.first_ts = self.last_ts = event.ts
        elif via not in self.vias and len(self.vias) >= _MAX_REPORTERS:
            via = "others"
        self.vias[via] = None
        self.first_ts = min(self.first_ts, event.ts)
        self.last_ts = max(self.last_ts, event.ts)
        self.tally.add(event, severity)
        if _is_uncorrected(severity):
            line, last = _line(event), self.uncorrected
            if line is None and last and together(event.ts, last[0]):
                line = last[1]  # another reporter of the same error
            self.uncorrected = event.ts, line
        # The last report of the worst kind speaks; what it leaves out, others may have said.
        worse = _rank(severity) >= _rank(self.facts.get("severity"))
        self.facts = {**self.facts, **facts} if worse else {**facts, **self.facts}
        self._note(event)

    def _note(self, event: Mce | HwError) -> None:
        key = _kind_of(event)
        kind = EntryKind.HARDWARE_ERROR
        if key not in self.moments and len(self.moments) >= _MAX_REPORTERS:
            key, kind = ("others",), EntryKind.MORE_HARDWARE_ERRORS
        known = self.moments.get(key)
        if known is None:
            exact = Join(JoinedBy.ADDRESS, 1 << self.page_shift << self.order)
            join = exact if self.order else Join(JoinedBy.PAGE_ADDRESS)
            self.moments[key] = TimelineEntry(
                event.ts,
                kind,
                event if kind is EntryKind.HARDWARE_ERROR else None,
                join,
                count=max(1, event.count),
                last_ts=event.ts,
            )
        else:
            self.moments[key] = replace(
                known,
                ts=min(known.ts, event.ts),
                last_ts=max(known.last_ts or 0, event.ts),
                count=known.count + max(1, event.count),
            )

    def called(self, name: Name) -> None:
        """A report names the memory."""
        self._reported = None
        known = self.names.get(name.label)
        if known is None and len(self.names) >= _MAX_REPORTERS:
            return
        if known is not None:
            lines = known.lines | name.lines
            if (known.corrected, known.worth) < (name.corrected, name.worth):
                self.names[name.label] = known._replace(lines=lines)
                return
            del self.names[name.label]
            name = name._replace(lines=lines)
        self.names[name.label] = name

    def covers(self, pfn: int) -> bool:
        """Whether the page is within what was reported."""
        return pfn >> self.order == self.pfn >> self.order

    def reported(self) -> Reported:
        """The counts and the best name, frozen."""
        if self._reported is None:
            best = _best_name([self])
            self._reported = Reported(self.history(), best.label if best else None)
        return self._reported

    def history(self) -> ErrorHistory:
        """The counts, frozen."""
        corrected, others = self.tally.errors
        return ErrorHistory(corrected + others, corrected, self.first_ts, self.last_ts)


@dataclass(slots=True)
class Dimm:
    """What was reported of one DIMM: errors at known places, and those without an address.

    ``vias``: who reports with addresses. One error may be reported with an address by one and
    without by another (AMD's controllers, whose addresses name no page, and EDAC, which translates
    them): the highest count of a reporter is shown.
    """

    first_ts: int
    last_ts: int
    corrected: int = 0
    others: int = 0
    elsewhere: ErrorCount = field(default_factory=lambda: ErrorCount(exact=False))
    vias: set[str] = field(default_factory=set)

    def absorb(self, other: Dimm) -> None:
        """It is the same DIMM."""
        self.first_ts = min(self.first_ts, other.first_ts)
        self.last_ts = max(self.last_ts, other.last_ts)
        self.corrected += other.corrected
        self.others += other.others
        self.elsewhere.absorb(other.elsewhere)
        self.vias |= other.vias

    def history(self) -> ErrorHistory:
        """The counts, frozen."""
        corrected, others = self.corrected, self.others
        for via, (more, more_others) in self.elsewhere.by_reporter():
            known = via in self.vias
            corrected = max(corrected, more + (self.corrected if known else 0))
            others = max(others, more_others + (self.others if known else 0))
        return ErrorHistory(corrected + others, corrected, self.first_ts, self.last_ts)


class HardwareErrors:
    """Remembers at most ``limit`` places and as many DIMMs, those that reported last."""

    def __init__(self, limit: int, page_shift: int = kvm.PAGE_SHIFT) -> None:
        self._limit = limit
        self._page_shift = page_shift
        self._places: BoundedDict[tuple[int, int], ErrorSite] = BoundedDict(limit)
        self._dimms: BoundedDict[str, Dimm] = BoundedDict(limit)
        # {name: a better one of the same DIMM}
        self._better: BoundedDict[str, str] = BoundedDict(limit)
        self._check: Mce | None = None  # the last one

    def report(self, event: Mce | HwError) -> ErrorSite | None:
        """Take a report; returns the place it names, None if it names none."""
        errors = self._place(event)
        if errors is not None:
            errors.add(event)
        labels = [self._one_name(name, errors) for name in self._names(event)]
        if labels:
            self._count(event, labels[-1], errors)
        return errors

    def _names(self, event: Mce | HwError) -> list[Name]:
        """What a report calls the memory; EDAC speaks of the machine check before it, which AMD's
        firmware may have given the name of a DIMM where EDAC knows a rank.
        """
        names = [_name(event)]
        if isinstance(event, Mce):
            self._check = event
        elif event.via == EDAC and (check := self._check) and together(check.ts, event.ts):
            of_check = _name(check)
            if of_check is not None:
                names.append(of_check._replace(addr=event.addr, lines=_line(event) or 0))
        return [name for name in names if name is not None]

    def _place(self, event: Mce | HwError) -> ErrorSite | None:
        place = place_of(event, self._page_shift)
        if place is None:
            return None
        pfn, order = place
        key = order, pfn >> order
        if key not in self._places and len(self._places) >= self._limit:
            self._spare_uncorrected()
        new = ErrorSite(pfn, order, self._page_shift, ErrorCount(exact=not order))
        return _renewed(self._places, key, new)

    def _spare_uncorrected(self) -> None:
        """A flood of corrected errors pushes out no other one, whose poison may still come."""
        for _ in range(self._limit // 2):
            key, oldest = next(iter(self._places.items()))
            if oldest.uncorrected is None:
                return
            self._places.move_to_end(key)

    def _one_name(self, name: Name, errors: ErrorSite | None) -> str:
        """The best name of the DIMM: two reporters of one error mean the same one."""
        if errors is not None:
            errors.called(name)
            same = [name, *filter(name.same_error, errors.names.values())]
            same = [one for one in same if dimm_names.names(one.label) != "candidates"]
            if same:
                best = self._best(min(same, key=lambda one: one.worth).label)
                for worse in dict.fromkeys(self._best(one.label) for one in same):
                    if worse != best:
                        self._same_dimm(worse, best)
        return self._best(name.label)

    def _best(self, label: str) -> str:
        return self._better.get(label, label)

    def _same_dimm(self, worse: str, better: str) -> None:
        for label in [label for label, known in self._better.items() if known == worse]:
            self._better[label] = better
        _renewed(self._better, worse, better)
        if (known := self._dimms.pop(worse, None)) is not None:
            new = Dimm(known.first_ts, known.last_ts)
            _renewed(self._dimms, better, new).absorb(known)

    def _count(self, event: Mce | HwError, label: str, errors: ErrorSite | None) -> None:
        dimm = _renewed(self._dimms, label, Dimm(event.ts, event.ts))
        dimm.first_ts, dimm.last_ts = min(dimm.first_ts, event.ts), max(dimm.last_ts, event.ts)
        severity = severity_of(event)
        if errors is None:
            dimm.elsewhere.add(event, severity)
            return
        tally = next((errors.named[x] for x in errors.named if self._best(x) == label), None)
        if tally is None:
            if len(errors.named) >= _MAX_REPORTERS:
                dimm.elsewhere.add(event, severity)
                return
            tally = errors.named[label] = ErrorCount(exact=not errors.order)
        before = tally.errors
        tally.add(event, severity, errors.tally)
        if len(dimm.vias) < _MAX_REPORTERS:
            dimm.vias.add(_via(event))
        # What turns out not to have been corrected may be of a DIMM that was forgotten since.
        dimm.corrected = max(0, dimm.corrected + tally.errors[0] - before[0])
        dimm.others += tally.errors[1] - before[1]

    def at(self, pfn: int) -> list[ErrorSite]:
        """What was reported of places that hold this page, the most exact first."""
        orders = _MAX_SHIFT - self._page_shift + 1
        found = (self._places.get((order, pfn >> order)) for order in range(orders))
        return [errors for errors in found if errors is not None]

    def origin(self, places: Collection[ErrorSite]) -> Origin | None:
        """All that is known of a page from these places.

        Errors that were not corrected speak first, and of these what was said of the page alone: a
        report of a whole range has the address of another page.
        """
        vias = tuple(dict.fromkeys(via for errors in places for via in errors.vias))
        places = sorted(places, key=lambda errors: (errors.uncorrected is None, errors.order))
        if not places:
            return None
        facts: dict[str, int | str] = {}
        for errors in places:
            facts = {**errors.facts, **facts}
        histories = [errors.history() for errors in places]
        best = _best_name(places)
        label = self._best(best.label) if best else None
        dimm = self._dimms.get(label) if label else None
        return Origin(
            via=vias,
            history=ErrorHistory(
                max(h.count for h in histories),
                max(h.corrected for h in histories),
                min(h.first_ts for h in histories),
                max(h.last_ts for h in histories),
            ),
            label=label,
            dimm=dimm.history() if dimm else None,
            **facts,  # type: ignore[arg-type]  # names and types are _facts'
        )

    def reported(self) -> dict[int, Reported]:
        """{pfn: what was reported of that one page}."""
        found = {e.pfn: e.reported() for e in self._places.values() if not e.order}
        better = [pfn for pfn, one in found.items() if one.label in self._better]
        return found | {pfn: self._named_better(found[pfn]) for pfn in better}

    def _named_better(self, page: Reported) -> Reported:
        return replace(page, label=self._best(page.label or ""))

    def dimms(self) -> dict[str, ErrorHistory]:
        """{label: what was reported of that DIMM}."""
        return {label: dimm.history() for label, dimm in self._dimms.items()}


def _renewed(known: BoundedDict[_K, _V], key: _K, new: _V) -> _V:
    """What is known by ``key``, or else ``new``; it is forgotten last now."""
    value = known.get(key, new)
    known.renew(key, value)
    return value


def _best_name(places: list[ErrorSite]) -> Name | None:
    """Of the most exact place, the last of equals.

    The lines of a page are of several DIMMs: where an error was not corrected, its name goes before
    those of corrected ones, and what is known to be the name of another line is none for it.
    """
    names = [name for errors in places for name in reversed(errors.names.values())]
    bad = [errors.uncorrected for errors in places if errors.uncorrected]
    if not bad:
        return min(names, key=lambda name: name.worth, default=None)
    found: list[tuple[bool, tuple[bool, int], Name]] = []
    for name in names:
        fits = {name.is_for(*error) for error in bad}
        if fits != {False}:
            found.append((True not in fits, name.worth, name))
    return min(found, key=lambda one: one[:2])[2] if found else None


def place_of(event: Mce | HwError, page_shift: int = kvm.PAGE_SHIFT) -> tuple[int, int] | None:
    """(pfn, order) that a report names; None without a usable address."""
    pfn, grain = event.pfn, page_shift
    if isinstance(event, HwError):
        if pfn is None and event.addr is not None:
            pfn = event.addr >> page_shift
        if event.grain:
            grain = (event.grain - 1).bit_length()
    else:
        if not _usable(event):
            return None
        grain = mce.address_shift(event.status, event.misc) or page_shift
    order = max(0, grain - page_shift)
    return None if pfn is None or order > _MAX_SHIFT - page_shift else (pfn, order)


def _usable(check: Mce) -> bool:
    """Whether the pfn is one: older recordings have them of any address that a register has."""
    if check.vendor is None or check.addr is None or not check.status & mce.ADDRV:
        return True
    registers = (check.addr, check.status, check.misc, check.vendor, None)
    return mce.physical(*registers, bank=check.bank, ipid=check.ipid) is not None


def severity_of(event: Mce | HwError) -> str | None:
    """One of events.HwError's severities; None if the report does not say."""
    if isinstance(event, HwError):
        return event.severity
    return mce.severity(event.status, event.vendor)


def _name(event: Mce | HwError) -> Name | None:
    """What a report calls the memory; recordings hold what was no name, too."""
    if isinstance(event, Mce):
        # What another unit calls itself is no DIMM.
        label = dimm_names.of_fru(event.fru) if mce.is_umc(event.ipid) else None
        source = "fru"
    else:
        label = dimm_names.label(event.label)
        source = event.label_from or ("edac" if event.via == EDAC else "smbios")
    if label is None or _NO_HANDLE.fullmatch(label):
        return None
    order = _SOURCES.index(source) if source in _SOURCES else len(_SOURCES)
    worth = (dimm_names.names(label) != "dimm", order)
    corrected = not _is_uncorrected(severity_of(event))
    if isinstance(event, Mce):
        return Name(label, worth, event.ts, corrected=corrected)
    line = _line(event) or 0
    return Name(label, worth, event.ts, event.addr, corrected, line)


def _is_uncorrected(severity: str | None) -> bool:
    return severity not in (None, "corrected")


def _line(event: Mce | HwError) -> int | None:
    """The bit of the cache line in its page; None where the report is less exact than that."""
    if event.addr is None:
        return None
    if isinstance(event, HwError):
        # Without a grain: firmware that knows the page only names its start.
        exact = event.grain <= _LINE if event.grain else event.addr % _PAGE != 0
    else:
        exact = 1 << (mce.address_shift(event.status, event.misc) or 0) <= _LINE
    return 1 << event.addr // _LINE % _LINES if exact else None


def _via(event: Mce | HwError) -> str:
    return event.via if isinstance(event, HwError) else MCE


def _kind_of(event: Mce | HwError) -> tuple[object, ...]:
    """What two reports have in common that are one entry of the timeline."""
    severity = severity_of(event)
    if isinstance(event, HwError):
        return severity, event.via, dimm_names.label(event.label)
    if event.bank == mce.FIRMWARE_BANK:
        return severity, event.bank
    return severity, _at(event), event.bank, event.cpu, event.socket


def _at(check: Mce) -> str | None:
    return mce.at(check.status, check.vendor, check.bank, check.ipid)


def _rank(severity: object) -> int:
    return _SEVERITIES.index(severity) if severity in _SEVERITIES else -1


def _facts(event: Mce | HwError) -> dict[str, int | str]:
    """What goes into an ``Origin`` under the same names."""
    facts: dict[str, object] = {"severity": severity_of(event), "addr": event.addr}
    if isinstance(event, HwError):
        facts |= {"socket": event.socket, "node": event.node, "message": event.message}
    elif event.bank != mce.FIRMWARE_BANK:
        facts |= {"bank": event.bank, "cpu": event.cpu, "status": event.status}
        match _at(event):
            case "memory":
                facts["socket"] = event.socket
            case "consumer":
                facts |= {"consumer_cpu": event.cpu, "consumer_socket": event.socket}
    known = {name: value for name, value in facts.items() if isinstance(value, (int, str))}
    return {name: value for name, value in known.items() if value != ""}
