"""Notifications of one vCPU about one page, as they are counted."""

from __future__ import annotations

from dataclasses import dataclass, field

_CODES_KEPT = 8
_PAGES_KEPT = 64


@dataclass(slots=True)
class Delivery:
    """Notifications of one vCPU.

    ``pages``: how many for each page of a huge page, the last ones; else of the page, as None.
    """

    exits: int = 0
    sigbus: dict[str, int] = field(default_factory=dict)
    first_ts: int = 0
    last_ts: int = 0
    pages: dict[int | None, int] = field(default_factory=dict)

    def add(self, ts: int, page: int | None, exits: int, code: str | None, signals: int) -> None:
        """Count exits, and signals of a code."""
        self.first_ts = ts if ts < self.first_ts else self.first_ts
        self.last_ts = ts if ts > self.last_ts else self.last_ts
        self.exits += exits
        self._add_page(page, exits + signals)
        if code is not None:
            self._add_signals(code, signals)

    def absorb(self, other: Delivery) -> None:
        """Count what was counted of the same vCPU elsewhere."""
        self.first_ts = min(self.first_ts, other.first_ts)
        self.last_ts = max(self.last_ts, other.last_ts)
        self.exits += other.exits
        for page, count in other.pages.items():
            self._add_page(page, count)
        for code, count in other.sigbus.items():
            self._add_signals(code, count)

    def name_page(self, page: int | None) -> None:
        """The page turned out to be a part of a huge one."""
        if None in self.pages:
            self._add_page(page, self.pages.pop(None))

    def _add_page(self, page: int | None, count: int) -> None:
        pages = self.pages
        before = pages.get(page, 0)
        if before and len(pages) > 1:
            del pages[page]  # the last one is to be at the end
        pages[page] = before + count
        if len(pages) > _PAGES_KEPT:
            del pages[next(iter(pages))]

    def _add_signals(self, code: str, count: int) -> None:
        if code not in self.sigbus and len(self.sigbus) >= _CODES_KEPT:
            code = "other"  # there are two; the rest is damage
        self.sigbus[code] = self.sigbus.get(code, 0) + count
