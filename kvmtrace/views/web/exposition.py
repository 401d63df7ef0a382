"""Metrics as text. Families with a series for each VM are written here, all others by the library.

``prometheus_client`` makes several objects for each series of a scrape and puts its labels into
order anew, which with 1,000 VMs costs the reader of events a twentieth of a second. The text is the
same as the library's; a test compares them. What has not changed since the last scrape is not
written again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

_SUFFIXES = {"counter": "_total", "info": "_info", "gauge": ""}
_EOF = b"# EOF\n"

Labels = tuple[str, ...]
Row = tuple[Labels, float]


class ManySeries:
    """A family with many series, whose lines are kept from one scrape to the next.

    ``kind``: "counter", "gauge" or "info". ``labels``: their names.
    """

    def __init__(self, name: str, documentation: str, kind: str, labels: Sequence[str]) -> None:
        self.name, self.documentation, self.kind = name, documentation, kind
        self._sample = name + _SUFFIXES[kind]
        # The library writes labels in the order of their names.
        order = sorted((label, place) for place, label in enumerate(labels))
        pairs = ",".join(f'{label}="{{{place}}}"' for label, place in order)
        self._head = f"{self._sample}{{{{{pairs}}}}} "
        self._labels = tuple(labels)

    def text(self, rows: Iterable[Row], before: str = "") -> str:
        """Return the lines of these series. ``before``: those with the same labels, in order."""
        if before:
            # What precedes the values in their lines.
            heads = [line[: line.rfind(" ") + 1] for line in before.splitlines()]
        else:
            heads = [self._head.format(*map(_escaped, labels)) for labels, _ in rows]
        lines = [
            head + (_number(value) if value else "0.0")
            for head, (_, value) in zip(heads, rows, strict=True)
        ]
        return "\n".join([*lines, ""])

    def fill(self, family: Metric, rows: Iterable[Row]) -> None:
        """Add the samples of these series, as the library has them."""
        for labels, value in rows:
            family.add_sample(
                self._sample, dict(zip(self._labels, labels, strict=True)), float(value)
            )


class Rows(Metric):
    """A family of many series, in one scrape. It has ``samples`` once it is ``filled``."""

    def __init__(
        self, series: ManySeries, texts: Sequence[str], rows: Callable[[], Iterable[Row]]
    ) -> None:
        """``texts``: the lines of all series. ``rows``: returns what they are of."""
        super().__init__(series.name, series.documentation, series.kind)
        self._series = series
        self._texts, self._rows = texts, rows

    def filled(self) -> Rows:
        """Return the family with its samples, for the library and for tests."""
        self._series.fill(self, self._rows())
        return self

    def text(self) -> bytes:
        return "".join(self._texts).encode()


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
    if '"' not in value and "\\" not in value and "\n" not in value:
        return value
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
