"""The exporter: the model as Prometheus metrics.

Names and labels of metrics are a contract (README). Nothing here is global: a collector draws from
the snapshots it is given, so several exporters can be in one process.

There are no ``_created`` series: they would double the series of each VM, and most Prometheus
servers ignore them. Counters start at 0 instead.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate, chain
from typing import Protocol, runtime_checkable

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from kvmtrace import __version__
from kvmtrace.judgement.urgency import Urgency, urgency_of
from kvmtrace.linux import clock, privileges
from kvmtrace.model import LATENCY_BUCKETS, IncidentStatus, Snapshot, VerdictWord
from kvmtrace.views.web import history_metrics
from kvmtrace.views.web.exposition import filled, render
from kvmtrace.views.web.since_start import since
from kvmtrace.views.web.vm_labels import VmLabels, clean
from kvmtrace.views.web.vm_metrics import VmMetrics

DEFAULT_MAX_VMS = 500

# Page types and results that are exported as 0 if the kernel's own list is not known. Alerts sum
# all kinds, so one of them at 0 is enough for increase() to see the first poison of any kind.
FALLBACK_KINDS = tuple(
    ("unknown page", result) for result in ("Ignored", "Failed", "Delayed", "Recovered")
)

# Places where events can be lost, exported as 0 from the start: the BPF source's ring buffer and
# maps, the ftrace source's rings, kprobes and counts, searches for owners that had no room, and
# what the correlator has to forget. A test compares it with the places in the sources.
ZERO_LOST = (
    *("ring", "exit_keys", "exit_counts", "refused_counts", "signal_counts"),
    *("ftrace_poison", "ftrace_signals", "ftrace_faults", "ftrace_missed", "ftrace_damaged"),
    *("owner_searches", "found_pages", "unknown_vms", "halves", "descriptors"),
    *("incidents", "vms", "owners", "told", "looks", "refusals", "soft_offlines"),
    *("clock_steps", "disk"),
)

Kinds = Callable[[], Iterable[tuple[str, str]]]


class Snapshots(Protocol):
    """What the exporter needs of a ``Session``; ``snapshot`` raises if the source ended."""

    def snapshot(self) -> Snapshot: ...


@runtime_checkable
class Reader(Protocol):
    """A ``Session`` with a heartbeat: ``age`` is the seconds since the source was last read."""

    def age(self) -> float: ...


class Exporter(Collector):
    """A collector over ``snapshot``. ``kinds``: the kernel's (page type, result), called once.

    A part that fails is left out, its ``kvmtrace_scrape_collector_success`` is 0, and the other
    parts are exported. All but the build info needs the part "snapshot".
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        *,
        kinds: Kinds = lambda: FALLBACK_KINDS,
        max_vms: int = DEFAULT_MAX_VMS,
    ) -> None:
        self._snapshot = snapshot
        self._kinds_of_kernel = kinds
        self._kinds: tuple[tuple[str, str], ...] | None = None
        self._labels = VmLabels(max_vms)
        self._by_vm = VmMetrics()
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """Yield every family of the contract, from one snapshot."""
        return filled(self.families())

    def families(self) -> Iterator[Metric]:
        """Yield every family of the contract, for ``render``."""
        success = GaugeMetricFamily(
            "kvmtrace_scrape_collector_success",
            "1 if this part of kvmtrace could be read for this scrape.",
            labels=["collector"],
        )
        yield InfoMetricFamily("kvmtrace_build", "Version of kvmtrace.", {"version": __version__})
        # One scrape at a time: if an older snapshot were labelled after a newer one, counters
        # would go down.
        with self._lock:
            families = list(self._families(success))
        yield from families
        yield success

    def _families(self, success: GaugeMetricFamily) -> Iterator[Metric]:
        try:
            snapshot = self._snapshot()
        except BaseException:  # whatever ended the source, an exit() too: /-/healthy has the reason
            success.add_metric(["snapshot"], 0)
            return
        success.add_metric(["snapshot"], 1)
        history = snapshot.history
        if history is not None and history.start is not None and history.was_cut:
            snapshot = since(snapshot, history.start)
        for name, part in (
            ("kinds", self._load_kinds),
            ("host", _host),
            ("probes", _probes),
            ("vms", self._vms),
            ("incidents", self._incidents),
            ("history", history_metrics.families),
        ):
            try:
                families = list(part(snapshot))
            except Exception:  # no family is better than half of one
                success.add_metric([name], 0)
            else:
                success.add_metric([name], 1)
                yield from families

    def _load_kinds(self, _: Snapshot) -> Iterator[Metric]:
        """Call ``kinds`` once. A part of its own, so that its failure costs no other metrics."""
        if self._kinds is None:
            self._kinds = tuple(self._kinds_of_kernel())
        return iter(())

    def _vms(self, snapshot: Snapshot) -> Iterator[Metric]:
        series, folded = self._labels.series(snapshot.vms)
        yield GaugeMetricFamily(
            "kvmtrace_vms_folded", 'VMs without series of their own, summed in vm="other".', folded
        )
        yield from self._by_vm.families(series, snapshot)

    def _incidents(self, snapshot: Snapshot) -> Iterator[Metric]:
        poisons = CounterMetricFamily(
            "kvmtrace_poison_events",
            "Pages the kernel declared poisoned, with type and result as it names them.",
            labels=["page_type", "result"],
        )
        kinds: Counter[tuple[str, str]] = Counter()
        for page_type, result in self._kinds or FALLBACK_KINDS:
            kinds[clean(page_type), clean(result)] = 0
        for (page_type, result), count in snapshot.poisons.items():
            kinds[clean(page_type), clean(result)] += count
        for labels, count in kinds.items():
            poisons.add_metric(labels, count)
        yield poisons
        incidents = GaugeMetricFamily(
            "kvmtrace_incidents",
            "Incidents remembered, by state: a poisoned page with its owners and deliveries.",
            labels=["state"],
        )
        states = Counter(dict.fromkeys(IncidentStatus, 0))
        states.update(incident.state for incident in snapshot.incidents)
        for state, count in states.items():
            incidents.add_metric([state], count)
        yield incidents
        yield GaugeMetricFamily(
            "kvmtrace_kernel_poisoned_pages",
            "Poisoned pages that the kernel uses itself or could not get hold of: host at risk.",
            snapshot.kernel_pages,
        )
        yield GaugeMetricFamily(
            "kvmtrace_host_at_risk",
            "1 while the kernel uses a poisoned page, or may: the host can go down with its VMs.",
            float(snapshot.kernel_pages > 0),
        )
        verdicts = GaugeMetricFamily(
            "kvmtrace_incident_verdicts",
            "Incidents of which a VMM was notified, by what it did then.",
            labels=["verdict"],
        )
        words = Counter(dict.fromkeys(VerdictWord, 0))
        words.update(one.verdict for one in snapshot.incidents if one.verdict is not None)
        for word, count in words.items():
            verdicts.add_metric([word], count)
        yield verdicts
        by_urgency = GaugeMetricFamily(
            "kvmtrace_incident_urgencies",
            "Incidents remembered, by urgency: state and verdicts together.",
            labels=["urgency"],
        )
        urgencies = Counter(dict.fromkeys(Urgency, 0))
        urgencies.update(map(urgency_of, snapshot.incidents))
        for urgency, count in urgencies.items():
            by_urgency.add_metric([urgency], count)
        yield by_urgency
        bounds = [*(repr(float(bound)) for bound in LATENCY_BUCKETS), "+Inf"]
        yield HistogramMetricFamily(
            "kvmtrace_poison_to_delivery_seconds",
            "Time from a page's poisoning to its first delivery to userspace.",
            buckets=list(zip(bounds, accumulate(snapshot.latency.counts), strict=True)),
            sum_value=snapshot.latency.sum_seconds,
        )


def _host(snapshot: Snapshot) -> Iterator[Metric]:
    lost = CounterMetricFamily(
        "kvmtrace_events_lost", "What kvmtrace could not record, by place.", labels=["where"]
    )
    places = Counter(dict.fromkeys(ZERO_LOST, 0))
    for where, count in snapshot.lost.items():
        places[clean(where)] += count
    for where, count in places.items():
        lost.add_metric([where], count)
    yield lost
    yield CounterMetricFamily(
        "kvmtrace_clock_steps",
        "Steps of the wall clock since kvmtrace started, resumes of a suspended host among them.",
        len(snapshot.steps) + snapshot.lost.get("clock_steps", 0),
    )
    if snapshot.host is None:
        return
    source = {"source": clean(snapshot.host.source), "why": clean(snapshot.host.source_why)}
    yield InfoMetricFamily("kvmtrace_source", "Where events come from, and why there.", source)
    if snapshot.host.hardware_corrupted_bytes is not None:
        yield GaugeMetricFamily(
            "kvmtrace_hardware_corrupted_bytes",
            "Memory that the kernel has taken out of use (HardwareCorrupted in /proc/meminfo).",
            snapshot.host.hardware_corrupted_bytes,
        )


def _probes(snapshot: Snapshot) -> Iterator[Metric]:
    attached = GaugeMetricFamily(
        "kvmtrace_probe_attached", "1 if the probe is attached.", labels=["probe"]
    )
    runs = CounterMetricFamily("kvmtrace_probe_runs", "Times the probe ran.", labels=["probe"])
    seconds = CounterMetricFamily(
        "kvmtrace_probe_run_seconds", "Time spent in the probe.", labels=["probe"]
    )
    for probe in snapshot.probes:
        attached.add_metric([clean(probe.name)], float(probe.attached))
    for name, account in snapshot.probe_runs.items():
        runs.add_metric([clean(name)], account.runs)
        seconds.add_metric([clean(name)], account.run_ns / 1e9)
    return iter((attached, runs, seconds))


class Registry:
    """All that ``/metrics`` has: the model, kvmtrace's own state, and what it costs."""

    def __init__(
        self,
        exporter: Exporter,
        session: Snapshots,
        dropped: Mapping[str, int],
        hooks: Mapping[str, int] | None = None,
    ) -> None:
        """``dropped``: connections that the server gave up, by reason.

        ``hooks``: runs by how they ended, and "dropped"; None: there is no hook.
        """
        self._exporter = exporter
        self._others = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._others)  # process_cpu_seconds_total …
        self._others.register(_Service(session, dropped, hooks))

    def text(self, *, as_openmetrics: bool) -> bytes:
        families = chain(self._exporter.families(), self._others.collect())
        return render(families, as_openmetrics=as_openmetrics)


class _Service(Collector):
    """kvmtrace's own state, which is exported even if there are no snapshots."""

    def __init__(
        self, session: Snapshots, dropped: Mapping[str, int], hooks: Mapping[str, int] | None
    ) -> None:
        self._session = session
        self._dropped = dropped
        self._hooks = hooks

    def collect(self) -> Iterator[Metric]:
        dropped = CounterMetricFamily(
            "kvmtrace_http_connections_dropped",
            "Connections given up: for newer ones, past their deadline, or without a descriptor.",
            labels=["why"],
        )
        for why, count in self._dropped.items():
            dropped.add_metric([why], count)
        yield dropped
        if self._hooks is not None:
            yield from _hooks(self._hooks)
        yield _privileges()
        if isinstance(self._session, Reader):
            try:
                age = self._session.age()
            except BaseException:  # /-/healthy has the reason
                return
            yield GaugeMetricFamily(
                "kvmtrace_last_poll_timestamp_seconds",
                "When the source was last read, in seconds since the epoch.",
                clock.wall_ns() / 1e9 - age,
            )


def _hooks(counts: Mapping[str, int]) -> Iterator[Metric]:
    runs = CounterMetricFamily(
        "kvmtrace_hook_runs",
        "Runs of the program for changes of incidents, by how they ended.",
        labels=["result"],
    )
    for result, count in counts.items():
        if result != "dropped":
            runs.add_metric([result], count)
    yield runs
    yield CounterMetricFamily(
        "kvmtrace_hook_dropped",
        "Changes of incidents for which the program was not run: too many were waiting.",
        counts["dropped"],
    )


def _privileges() -> Metric:
    """Privileges of the thread that answers; all threads have the same."""
    now = privileges.held()
    return InfoMetricFamily(
        "kvmtrace_privileges",
        "What kvmtrace may do: its user, its capabilities, and whether it can get more.",
        {
            "uid": str(os.geteuid()),
            "capabilities": ",".join(now.capabilities),
            "no_new_privs": str(int(now.no_new_privileges)),
        },
    )
