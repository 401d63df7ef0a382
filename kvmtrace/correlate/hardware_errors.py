"""What hardware and firmware reported, by page and by DIMM.

One error is often reported several times: by several banks, by EDAC and by firmware. ``ErrorCount``
counts errors, not reports.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import TypeVar

from kvmtrace import dimm_names, kvm
from kvmtrace.bounded import BoundedDict
from kvmtrace.correlate.error_counts import EDAC, ErrorCount, together
from kvmtrace.correlate.error_site import (
    MAX_REPORTERS,
    MAX_SHIFT,
    ErrorSite,
    Name,
    best_name,
    line_of,
    name_of,
    place_of,
)
from kvmtrace.events import HwError
from kvmtrace.model import ErrorHistory, Origin, Reported

_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(slots=True)
class Dimm:
    """What was reported of one DIMM.

    ``corrected``, ``others``: errors at known places. ``elsewhere``: errors without an address.
    ``vias``: reporters that give addresses. One error may be reported with an address by one and
    without by another (AMD's controllers, whose addresses name no page, and EDAC, which translates
    them), so the highest count of a reporter is shown.
    """

    first_ts: int
    last_ts: int
    corrected: int = 0
    others: int = 0
    elsewhere: ErrorCount = field(default_factory=lambda: ErrorCount(exact=False))
    vias: set[str] = field(default_factory=set)

    def absorb(self, other: Dimm) -> None:
        """Add what was reported of the same DIMM under another name."""
        self.first_ts = min(self.first_ts, other.first_ts)
        self.last_ts = max(self.last_ts, other.last_ts)
        self.corrected += other.corrected
        self.others += other.others
        self.elsewhere.absorb(other.elsewhere)
        self.vias |= other.vias

    def history(self) -> ErrorHistory:
        corrected, others = self.corrected, self.others
        for via, (more, more_others) in self.elsewhere.by_reporter():
            known = via in self.vias
            corrected = max(corrected, more + (self.corrected if known else 0))
            others = max(others, more_others + (self.others if known else 0))
        return ErrorHistory(corrected + others, corrected, self.first_ts, self.last_ts)


class HardwareErrors:
    """At most ``limit`` places and as many DIMMs; the least recently reported are forgotten."""

    def __init__(self, limit: int, page_shift: int = kvm.PAGE_SHIFT) -> None:
        self._limit = limit
        self._page_shift = page_shift
        self._places: BoundedDict[tuple[int, int], ErrorSite] = BoundedDict(limit)
        self._dimms: BoundedDict[str, Dimm] = BoundedDict(limit)
        # {name: a better name of the same DIMM}
        self._better: BoundedDict[str, str] = BoundedDict(limit)
        self._last_check: HwError | None = None
        self.reports = 0
        """How many came: what is known of a place changes only with them."""

    def report(self, event: HwError) -> ErrorSite | None:
        """Take a report and return the place it names; None if it names none."""
        self.reports += 1
        site = self._site(event)
        if site is not None:
            site.add(event)
        labels = [self._merge_names(name, site) for name in self._names(event)]
        if labels:
            self._count(event, labels[-1], site)
        return site

    def _names(self, event: HwError) -> list[Name]:
        """Names that a report has for the memory.

        An EDAC report is about the machine check before it. AMD's firmware may have put the name of
        a DIMM there, while EDAC has only a rank.
        """
        names = [name_of(event)]
        if event.check:
            self._last_check = event
        elif event.via == EDAC and (check := self._last_check) and together(check.ts, event.ts):
            of_check = name_of(check)
            if of_check is not None:
                names.append(of_check._replace(addr=event.addr, lines=line_of(event) or 0))
        return [name for name in names if name is not None]

    def _site(self, event: HwError) -> ErrorSite | None:
        place = place_of(event, self._page_shift)
        if place is None:
            return None
        pfn, order = place
        key = order, pfn >> order
        if key not in self._places and len(self._places) >= self._limit:
            self._spare_uncorrected()
        return _renewed(
            self._places,
            key,
            lambda: ErrorSite(pfn, order, self._page_shift, ErrorCount(exact=not order)),
        )

    def _spare_uncorrected(self) -> None:
        """Keep uncorrected errors in a flood of corrected ones: their poison may still come."""
        for _ in range(self._limit // 2):
            key, oldest = next(iter(self._places.items()))
            if oldest.uncorrected is None:
                return
            self._places.move_to_end(key)

    def _merge_names(self, name: Name, site: ErrorSite | None) -> str:
        """Return the best name of the DIMM: two reporters of one error mean the same DIMM."""
        if site is not None:
            site.add_name(name)
            same = [name, *filter(name.same_error, site.names.values())]
            same = [one for one in same if dimm_names.names(one.label) != "candidates"]
            if same:
                best = self._best(min(same, key=lambda one: one.rank).label)
                for worse in dict.fromkeys(self._best(one.label) for one in same):
                    if worse != best:
                        self._same_dimm(worse, best)
        return self._best(name.label)

    def _best(self, label: str) -> str:
        return self._better.get(label, label)

    def _same_dimm(self, worse: str, better: str) -> None:
        for label in [label for label, known in self._better.items() if known == worse]:
            self._better[label] = better
        self._better.renew(worse, self._better.get(worse, better))
        if (known := self._dimms.pop(worse, None)) is not None:
            new = functools.partial(Dimm, known.first_ts, known.last_ts)
            _renewed(self._dimms, better, new).absorb(known)

    def _count(self, event: HwError, label: str, site: ErrorSite | None) -> None:
        dimm = _renewed(self._dimms, label, lambda: Dimm(event.ts, event.ts))
        dimm.first_ts, dimm.last_ts = min(dimm.first_ts, event.ts), max(dimm.last_ts, event.ts)
        severity = event.severity
        if site is None:
            dimm.elsewhere.add(event, severity)
            return
        count = next((site.named[x] for x in site.named if self._best(x) == label), None)
        if count is None:
            if len(site.named) >= MAX_REPORTERS:
                dimm.elsewhere.add(event, severity)
                return
            count = site.named[label] = ErrorCount(exact=not site.order)
        before = count.errors
        count.add(event, severity, site.errors)
        if len(dimm.vias) < MAX_REPORTERS:
            dimm.vias.add(event.via)
        # An error that turns out not to have been corrected may be of a forgotten DIMM.
        dimm.corrected = max(0, dimm.corrected + count.errors[0] - before[0])
        dimm.others += count.errors[1] - before[1]

    def sites_of(self, pfn: int) -> list[ErrorSite]:
        """The places that hold this page and have reports, the most exact first."""
        orders = MAX_SHIFT - self._page_shift + 1
        found = (self._places.get((order, pfn >> order)) for order in range(orders))
        return [site for site in found if site is not None]

    def origin(self, sites: Collection[ErrorSite]) -> Origin | None:
        """All that is known of a page from these places.

        Uncorrected errors come first, and of these the reports of this page alone: a report of a
        whole range has the address of another page.
        """
        vias = tuple(dict.fromkeys(via for site in sites for via in site.vias))
        sites = sorted(sites, key=lambda site: (site.uncorrected is None, site.order))
        if not sites:
            return None
        facts: dict[str, int | str] = {}
        for site in sites:
            facts = {**site.facts, **facts}
        histories = [site.history() for site in sites]
        best = best_name(sites)
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
        for pfn in better:
            found[pfn] = replace(found[pfn], label=self._best(found[pfn].label or ""))
        return found

    def dimms(self) -> dict[str, ErrorHistory]:
        """{label: what was reported of that DIMM}."""
        return {label: dimm.history() for label, dimm in self._dimms.items()}


def _renewed(known: BoundedDict[_K, _V], key: _K, new: Callable[[], _V]) -> _V:
    """Return the value of ``key``, a ``new`` one if it had none, as the last to be forgotten."""
    value = known.get(key)
    if value is None:
        value = known[key] = new()
    else:
        known.move_to_end(key)
    return value
