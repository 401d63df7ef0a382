"""How fast counters grow: the rates of the last samples, and the same as a line of bars."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

SAMPLES = 8

_BARS = "▁▂▃▄▅▆▇█"


class Trends(Generic[Key]):
    """The growth a second of counters at the last ``SAMPLES`` times that ``add`` was called."""

    def __init__(self) -> None:
        self._last: tuple[dict[Key, int], int] | None = None
        self._samples: dict[Key, deque[float]] = {}

    def add(self, counts: Mapping[Key, int], now: int) -> None:
        """Take the counters at ``now`` (ns). A time before the last one begins anew."""
        if self._last is not None:
            old, then = self._last
            if now == then:
                return
            if now < then:
                self._samples.clear()
            else:
                self._sample(old, counts, (now - then) / 1e9)
        self._last = dict(counts), now

    def _sample(self, old: Mapping[Key, int], new: Mapping[Key, int], seconds: float) -> None:
        for key in self._samples.keys() - new.keys():
            del self._samples[key]
        for key, count in new.items():
            if key in old:
                rate = max(0, count - old[key]) / seconds
                self._samples.setdefault(key, deque(maxlen=SAMPLES)).append(rate)

    @property
    def rates(self) -> dict[Key, float]:
        """{key: growth a second between the last two times}; what is in one only is absent."""
        return {key: samples[-1] for key, samples in self._samples.items()}

    @property
    def bars(self) -> dict[Key, str]:
        """{key: a bar for each sample, oldest first}; what did not grow in any is absent."""
        return {key: bars(samples) for key, samples in self._samples.items() if any(samples)}


def bars(samples: Iterable[float]) -> str:
    """A character for each sample, as high as its share of the highest; 0 is a blank."""
    numbers = list(samples)
    top = max(numbers, default=0.0)
    return "".join(_BARS[min(7, int(8 * n / top))] if n > 0 else " " for n in numbers)
