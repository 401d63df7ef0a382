"""Metrics as text. Families with a series for each VM are written here, all others by the library.

``prometheus_client`` makes several objects for each series of a scrape and puts its labels into
order anew, which with 1,000 VMs costs the reader of events a twentieth of a second. The text is the
same as the library's; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

_SUFFIXES = {"counter": "_total", "info": "_info", "gauge": ""}
_EOF = b"# EOF\n"

Labels = tuple[str, ...]


class Heads:
    """What precedes the value in the lines of one family, from one scrape to the next, by labels.

    ``kind``: "counter", "gauge" or "info". ``labels``: their names.
    """

    def __init__(self, name: str, documentation: str, kind: str, labels: Sequence[str]) -> None:
        self.name, self.documentation, self.kind = name, documentation, kind
        self._sample = name + _SUFFIXES[kind]
        # The library writes labels in the order of their names.
        self._order = sorted((label, place) for place, label in enumerate(labels))
        self._labels = tuple(labels)
        self._heads: dict[Labels, str] = {}

    def family(self) -> Rows:
        """Return a family for one scrape."""
        return Rows(self)

    def text(self, rows: Sequence[tuple[Labels, float]]) -> bytes:
        """Return the lines of these series."""
        heads = self._heads
        if len(heads) > 2 * len(rows) + 1000:
            heads.clear()  # most are of VMs that are gone
        lines = []
        for labels, value in rows:
            head = heads.get(labels)
            if head is None:
                head = heads[labels] = self._head(labels)
            lines.append(f"{head} {_number(value)}\n" if value else f"{head} 0.0\n")
        return "".join(lines).encode()

    def fill(self, family: Metric, rows: Iterable[tuple[Labels, float]]) -> None:
        """Add the samples of these series, as the library has them."""
        for labels, value in rows:
            family.add_sample(
                self._sample, dict(zip(self._labels, labels, strict=True)), float(value)
            )

    def _head(self, labels: Labels) -> str:
        pairs = (f'{label}="{_escaped(labels[place])}"' for label, place in self._order)
        return f"{self._sample}{{{','.join(pairs)}}}"


class Rows(Metric):
    """A family of many series. It has ``samples`` once it is ``filled``."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads.name, heads.documentation, heads.kind)
        self._heads = heads
        self._rows: list[tuple[Labels, float]] = []

    def add_metric(self, labels: Labels, value: float) -> None:
        """Add a series."""
        self._rows.append((labels, value))

    def filled(self) -> Rows:
        """Return the family with its samples, for the library and for tests."""
        self._heads.fill(self, self._rows)
        return self

    def text(self) -> bytes:
        """Return the lines of its series."""
        return self._heads.text(self._rows)


def filled(families: Iterable[Metric]) -> Iterator[Metric]:
    """Yield families as the library's collectors do."""
    for family in families:
        yield family.filled() if isinstance(family, Rows) else family


def render(families: Iterable[Metric], *, as_openmetrics: bool = False) -> bytes:
    """Return the text of these families, in Prometheus' own format or in OpenMetrics."""
    parts: list[bytes] = []
    waiting = _Families()
    for family in families:
        waiting.append(family)
        if isinstance(family, Rows):  # the library writes what precedes its series
            parts += [waiting.text(as_openmetrics), family.text()]
            waiting = _Families()
    parts.append(waiting.text(as_openmetrics))
    return b"".join([*parts, _EOF if as_openmetrics else b""])


class _Families(list[Metric], Collector):
    def collect(self) -> Iterable[Metric]:
        return self

    def text(self, as_openmetrics: bool) -> bytes:
        if as_openmetrics:
            found: bytes = openmetrics.generate_latest(self)  # type: ignore[no-untyped-call]
            return found.removesuffix(_EOF)
        return generate_latest(self)


def _number(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
