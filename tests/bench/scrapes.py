"""A scrape of /metrics and a snapshot, by number of VMs."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvmtrace.views.web.exposition import render
from kvmtrace.views.web.metrics import DEFAULT_MAX_VMS, Exporter
from tests.bench.models import again, correlator
from tests.bench.timing import REPEATS, best, table

INCIDENTS = 100
# VMs, and the limit of those with series of their own.
SIZES = ((500, 500), (1000, 1000), (5000, 5000), (10_000, DEFAULT_MAX_VMS))


class _Floor(Collector):
    """As many series as a scrape has, with labels, made by the client library alone."""

    def __init__(self, series: int) -> None:
        self._series = series

    def collect(self) -> list[Metric]:
        """One family."""
        family = GaugeMetricFamily("kvmtrace_floor", "Floor.", labels=["vm", "errno", "cause"])
        for number in range(self._series):
            family.add_metric([f"instance-{number:05}", "EHWPOISON", "hwpoison"], number)
        return [family]


def _text_of(collector: Collector) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)


def _scrape(exporter: Exporter) -> bytes:
    if hasattr(exporter, "families"):
        return render(exporter.families())
    return _text_of(exporter)


def measure() -> list[str]:
    """Measure CPU milliseconds of a scrape."""
    head = (
        "VMs",
        "series",
        "first scrape, ms",
        "later ones, ms",
        "all changed, ms",
        "to the floor",
    )
    return [
        f"A scrape of /metrics ({INCIDENTS} incidents; the snapshot is apart, one serves a "
        "second): the first one, later ones if nothing has changed, and if each VM had an exit "
        "since. Floor: "
        "as many series, made by the client library alone.",
        "",
        *table(head, [_row(*size) for size in SIZES]),
    ]


def _row(vms: int, limit: int) -> tuple[str, ...]:
    model = correlator(vms, INCIDENTS)
    snapshots = [model.snapshot()]
    exporter = Exporter(lambda: snapshots[-1], max_vms=limit)
    began = time.process_time()
    text = _scrape(exporter)
    first = time.process_time() - began
    series = sum(not line.startswith(b"#") for line in text.splitlines())
    later = best(lambda: _scrape(exporter))
    costs = []
    for number in range(REPEATS):
        for event in again(vms, INCIDENTS, number):
            model.feed(event)
        snapshots[:] = [model.snapshot()]
        costs.append(best(lambda: _scrape(exporter), 1))
    floor = best(lambda: _text_of(_Floor(series)))
    return (
        f"{vms:,}, {limit:,} with series",
        f"{series:,}",
        f"{1e3 * first:.1f}",
        f"{1e3 * later:.1f}",
        f"{1e3 * min(costs):.1f}",
        f"{min(costs) / floor:.2f}",
    )
