"""Metrics of what ``serve`` keeps on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvmtrace.model import HistoryState, Snapshot


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield them; none without a history."""
    state = snapshot.history
    if state is None:
        return
    yield GaugeMetricFamily(
        "kvmtrace_history_writable",
        "1 if the disk took the last events that were to be kept.",
        float(state.is_written),
    )
    yield GaugeMetricFamily("kvmtrace_history_bytes", "Size of the history.", state.size)
    yield GaugeMetricFamily(
        "kvmtrace_history_events_waiting", "Events that are not on the disk yet.", state.waiting
    )
    yield CounterMetricFamily(
        "kvmtrace_history_events_written", "Events that were kept.", state.written
    )
    yield CounterMetricFamily(
        "kvmtrace_history_write_errors", "Times the disk did not take events.", state.errors
    )
    yield _by_reason(
        "kvmtrace_history_events_dropped", "Events that were not kept, by why.", state.dropped
    )
    yield _by_reason(
        "kvmtrace_history_events_deleted",
        "Events that were kept and had to go: by age, or by the size of the file.",
        state.deleted,
    )
    yield from _times(state)


def _by_reason(name: str, help_text: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_text, labels=["reason"])
    for reason, count in counts.items():
        family.add_metric([reason], count)
    return family


def _times(state: HistoryState) -> Iterator[Metric]:
    """Times that there are: without an event there is none."""
    for name, help_text, ns in (
        ("oldest_event", "When the oldest event happened that is kept.", state.oldest_ns),
        ("last_write", "When events were written last.", state.last_write_ns),
    ):
        if ns is not None:
            yield GaugeMetricFamily(
                f"kvmtrace_history_{name}_timestamp_seconds", help_text, ns / 1e9
            )
