"""Where errors come from: what hardware and firmware reported, by page and by DIMM.

A report is joined to a page by its address, as exactly as the report says it is: MCi_MISC's low six
bits (the address' least significant valid bit) where MCi_STATUS declares them valid, an EDAC
report's grain; at best a page. One error is often reported twice, by mce_record and by EDAC: each
reporter has a count of its own, and what is shown is the highest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from kvmtrace import kvm, mce
from kvmtrace.events import HwError, Mce
from kvmtrace.model import ErrorHistory, Moment, Origin

MCE = "mce:mce_record"
_SEVERITIES = ("corrected", "deferred", "recoverable", "fatal")

# Reports that are less exact (a whole rank, a channel) name no page.
_MAX_SHIFT = 30
_MAX_REPORTERS = 8

_K = TypeVar("_K")


@dataclass(slots=True)
class Errors:
    """What was reported of one place: 2**``order`` pages from ``pfn`` on, or one DIMM."""

    pfn: int | None = None
    order: int = 0
    counts: dict[str, list[int]] = field(default_factory=dict)  # reporter: [errors, corrected]
    first_ts: int = 0
    last_ts: int = 0
    facts: dict[str, int | str] = field(default_factory=dict)
    moments: dict[str, Moment] = field(default_factory=dict)
    page_shift: int = kvm.PAGE_SHIFT

    def add(self, event: Mce | HwError) -> None:
        """One more report."""
        facts = _facts(event)
        via, severity = _via(event), facts.get("severity")
        if not self.counts:
            self.first_ts = self.last_ts = event.ts
        elif via not in self.counts and len(self.counts) >= _MAX_REPORTERS:
            via = "others"
        self.first_ts = min(self.first_ts, event.ts)
        self.last_ts = max(self.last_ts, event.ts)
        count = event.count
        counts = self.counts.setdefault(via, [0, 0])
        counts[0] += count
        counts[1] += count if severity == "corrected" else 0
        # The last report of the worst kind speaks; what it leaves out, others may have said.
        worse = _rank(severity) >= _rank(self.facts.get("severity"))
        self.facts = {**self.facts, **facts} if worse else {**facts, **self.facts}
        self._note(event, count)

    def _note(self, event: Mce | HwError, count: int) -> None:
        what = _text(event)
        if what not in self.moments and len(self.moments) >= _MAX_REPORTERS:
            what = "errors of other kinds"
        known = self.moments.get(what)
        if known is None:
            exact = f"address, exact to {1 << self.page_shift << self.order} bytes"
            how = "address in the same page" if not self.order else exact
            self.moments[what] = Moment(event.ts, what, how, count=count, last_ts=event.ts)
        else:
            self.moments[what] = replace(
                known,
                ts=min(known.ts, event.ts),
                last_ts=max(known.last_ts or 0, event.ts),
                count=known.count + count,
            )

    def covers(self, pfn: int) -> bool:
        """Whether the page is within what was reported."""
        return self.pfn is not None and pfn >> self.order == self.pfn >> self.order

    def history(self) -> ErrorHistory:
        """The counts, frozen."""
        corrected = max(corrected for _, corrected in self.counts.values())
        others = max(errors - corrected for errors, corrected in self.counts.values())
        return ErrorHistory(corrected + others, corrected, self.first_ts, self.last_ts)


class Provenance:
    """Remembers at most ``limit`` places and as many DIMMs, those that reported last."""

    def __init__(self, limit: int, page_shift: int = kvm.PAGE_SHIFT) -> None:
        self._limit = limit
        self._page_shift = page_shift
        self._places: OrderedDict[tuple[int, int], Errors] = OrderedDict()
        self._dimms: OrderedDict[str, Errors] = OrderedDict()

    def report(self, event: Mce | HwError) -> Errors | None:
        """Take a report; returns the place it names, None if it names none."""
        label = event.label if isinstance(event, HwError) else None
        if label:
            self._of(self._dimms, label, Errors()).add(event)
        place = place_of(event, self._page_shift)
        if place is None:
            return None
        pfn, order = place
        new = Errors(pfn, order, page_shift=self._page_shift)
        errors = self._of(self._places, (order, pfn >> order), new)
        errors.add(event)
        return errors

    def _of(self, known: OrderedDict[_K, Errors], key: _K, new: Errors) -> Errors:
        errors = known.setdefault(key, new)
        known.move_to_end(key)
        while len(known) > self._limit:
            known.popitem(last=False)
        return errors

    def at(self, pfn: int) -> list[Errors]:
        """What was reported of places that hold this page, the most exact first."""
        orders = _MAX_SHIFT - self._page_shift + 1
        found = (self._places.get((order, pfn >> order)) for order in range(orders))
        return [errors for errors in found if errors is not None]

    def origin(self, places: Iterable[Errors]) -> Origin | None:
        """All that is known of a page from these places, the most exact one first."""
        places = list(places)
        if not places:
            return None
        facts: dict[str, int | str] = {}
        for errors in sorted(places, key=lambda e: -_rank(e.facts.get("severity"))):
            facts = {**errors.facts, **facts}
        histories = [errors.history() for errors in places]
        label = facts.get("label")
        dimm = self._dimms.get(label) if isinstance(label, str) else None
        return Origin(
            via=tuple(dict.fromkeys(via for errors in places for via in errors.counts)),
            history=ErrorHistory(
                max(h.count for h in histories),
                max(h.corrected for h in histories),
                min(h.first_ts for h in histories),
                max(h.last_ts for h in histories),
            ),
            dimm=dimm.history() if dimm else None,
            **facts,  # type: ignore[arg-type]  # names and types are _facts'
        )

    def dimms(self) -> dict[str, ErrorHistory]:
        """{label: what was reported of that DIMM}."""
        return {label: errors.history() for label, errors in self._dimms.items()}


def place_of(event: Mce | HwError, page_shift: int = kvm.PAGE_SHIFT) -> tuple[int, int] | None:
    """(pfn, order) that a report names; None without a usable address."""
    pfn, grain = event.pfn, page_shift
    if isinstance(event, HwError):
        if pfn is None and event.addr is not None:
            pfn = event.addr >> page_shift
        if event.grain:
            grain = (event.grain - 1).bit_length()
    else:
        grain = mce.address_shift(event.status, event.misc) or page_shift
    order = max(0, grain - page_shift)
    return None if pfn is None or order > _MAX_SHIFT - page_shift else (pfn, order)


def severity_of(event: Mce | HwError) -> str | None:
    """One of events.HwError's severities; None if the report does not say."""
    if isinstance(event, HwError):
        return event.severity
    if not event.status & mce.UC:
        deferred = event.vendor in mce.AMD and event.status & mce.DEFERRED
        return "deferred" if deferred else "corrected"
    return "fatal" if event.status & mce.PCC else "recoverable"


def _via(event: Mce | HwError) -> str:
    return event.via if isinstance(event, HwError) else MCE


def _text(event: Mce | HwError) -> str:
    severity = severity_of(event) or "memory"
    if isinstance(event, Mce):
        where = f"bank {event.bank}, CPU {event.cpu}, socket {event.socket}"
        return f"{severity} error by machine check: {where}"
    where = f": {event.label}" if event.label else ""
    return f"{severity} error by {event.via}{where}"


def _rank(severity: object) -> int:
    return _SEVERITIES.index(severity) if severity in _SEVERITIES else -1


def _facts(event: Mce | HwError) -> dict[str, int | str]:
    """What goes into an ``Origin`` under the same names."""
    names = ("addr", "socket", "node", "bank", "cpu", "status", "label", "message")
    facts = {name: getattr(event, name, None) for name in names}
    facts["severity"] = severity_of(event)
    return {name: value for name, value in facts.items() if value not in (None, "")}
