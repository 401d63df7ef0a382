"""The exporter: the model as Prometheus metrics, and the HTTP server around it.

Names and labels are the contract in design.md. Nothing here is global: a collector draws from the
snapshots it is given, so tests and several exporters in one process do not meet.

Metrics carry no ``_created`` series: they would double the per-VM series on every Prometheus that
does not know what to do with them. Counters are born at 0 instead.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol, cast

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from kvmtrace import __version__, clock
from kvmtrace.errors import KvmtraceError
from kvmtrace.model import LATENCY_BUCKETS, STATES, VERDICTS, Snapshot
from kvmtrace.views import page
from kvmtrace.views.server import DEFAULT_LISTEN, Server, start, text
from kvmtrace.views.vmseries import VmLabels, VmSeries, clean

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["DEFAULT_LISTEN", "DEFAULT_MAX_VMS", "Exporter", "Server", "serve"]

DEFAULT_MAX_VMS = 500

# Page types and results that are exported as 0 where the kernel's own list is not given. Alerts
# add up all kinds, so one of them at 0 is enough for the first poison of any kind to be seen.
FALLBACK_KINDS = tuple(
    ("unknown page", result) for result in ("Ignored", "Failed", "Delayed", "Recovered")
)

# Where things are known to get lost, exported as 0 from the start: the BPF source's ring buffer and
# maps, the ftrace source's rings, kprobes and counts, searches for owners that had no room, and
# what the correlator has to forget. A test holds it against what they say.
LOST_FROM_BIRTH = (
    *("ring", "exit_keys", "exit_counts", "refused_counts", "signal_counts"),
    *("ftrace_poison", "ftrace_signals", "ftrace_faults", "ftrace_missed", "owner_searches"),
    *("found_pages", "unknown_vms", "halves"),
    *("incidents", "vms", "owners", "told", "looks", "refusals", "soft_offlines"),
)

Kinds = Callable[[], Iterable[tuple[str, str]]]


class Snapshots(Protocol):
    """What the exporter needs of a ``live.Session``; ``snapshot`` raises if the source ended."""

    def snapshot(self) -> Snapshot: ...


class Exporter(Collector):
    """A collector over ``snapshot``. ``kinds``: the kernel's (page type, result) pairs, asked once.

    One part that fails does not take the others with it: it is left out, and its
    ``kvmtrace_scrape_collector_success`` is 0. All but build info needs "snapshot".
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        *,
        kinds: Kinds = lambda: FALLBACK_KINDS,
        max_vms: int = DEFAULT_MAX_VMS,
    ) -> None:
        self._snapshot = snapshot
        self._ask_kinds = kinds
        self._kinds: tuple[tuple[str, str], ...] | None = None
        self._labels = VmLabels(max_vms)
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """Every family of the contract, from one snapshot."""
        success = GaugeMetricFamily(
            "kvmtrace_scrape_collector_success",
            "1 if this part of kvmtrace could be read for this scrape.",
            labels=["collector"],
        )
        yield InfoMetricFamily("kvmtrace_build", "Version of kvmtrace.", {"version": __version__})
        # Snapshots are taken and labelled in one order: an older one after a newer one would
        # show counters going down.
        with self._lock:
            families = list(self._families(success))
        yield from families
        yield success

    def _families(self, success: GaugeMetricFamily) -> Iterator[Metric]:
        try:
            snapshot = self._snapshot()
        except BaseException:  # whatever ended the source, an exit() too: /-/healthy tells it
            success.add_metric(["snapshot"], 0)
            return
        success.add_metric(["snapshot"], 1)
        for name, part in (
            ("kinds", self._learn_kinds),
            ("host", _host),
            ("probes", _probes),
            ("vms", self._vms),
            ("incidents", self._incidents),
        ):
            try:
                families = list(part(snapshot))
            except Exception:  # half a family would be worse than none
                success.add_metric([name], 0)
            else:
                success.add_metric([name], 1)
                yield from families

    def _learn_kinds(self, _: Snapshot) -> Iterator[Metric]:
        """No metrics, but no part either whose failure may take incidents with it."""
        if self._kinds is None:
            self._kinds = tuple(self._ask_kinds())
        return iter(())

    def _vms(self, snapshot: Snapshot) -> Iterator[Metric]:
        series, folded = self._labels.series(snapshot.vms)
        yield GaugeMetricFamily(
            "kvmtrace_vms_folded", 'VMs without series of their own, summed in vm="other".', folded
        )
        yield from _vm_families(series)

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
        states = dict.fromkeys(STATES, 0)
        for incident in snapshot.incidents:
            states[incident.state] = states.get(incident.state, 0) + 1
        for state, count in states.items():
            incidents.add_metric([state], count)
        yield incidents
        yield GaugeMetricFamily(
            "kvmtrace_kernel_poisoned_pages",
            "Poisoned pages that the kernel uses itself or could not get hold of: host at risk.",
            snapshot.kernel_pages,
        )
        verdicts = GaugeMetricFamily(
            "kvmtrace_incident_verdicts",
            "Incidents that a VMM was told of, by what it did then.",
            labels=["verdict"],
        )
        words = dict.fromkeys(VERDICTS, 0)
        for incident in snapshot.incidents:
            if incident.verdict is not None:
                words[incident.verdict] = words.get(incident.verdict, 0) + 1
        for word, count in words.items():
            verdicts.add_metric([word], count)
        yield verdicts
        bounds = [*(repr(float(bound)) for bound in LATENCY_BUCKETS), "+Inf"]
        yield HistogramMetricFamily(
            "kvmtrace_poison_to_delivery_seconds",
            "Time from a page's poisoning until userspace was first told of it.",
            buckets=list(zip(bounds, accumulate(snapshot.latency.counts), strict=True)),
            sum_value=snapshot.latency.sum_seconds,
        )


def _host(snapshot: Snapshot) -> Iterator[Metric]:
    lost = CounterMetricFamily(
        "kvmtrace_events_lost", "What kvmtrace could not record, by place.", labels=["where"]
    )
    places = Counter(dict.fromkeys(LOST_FROM_BIRTH, 0))
    for where, count in snapshot.lost.items():
        places[clean(where)] += count
    for where, count in places.items():
        lost.add_metric([where], count)
    yield lost
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


def _vm_families(series: list[VmSeries]) -> Iterator[Metric]:
    info = InfoMetricFamily("kvmtrace_vm", "Who is behind a vm label.", labels=["vm"])
    exits = CounterMetricFamily(
        "kvmtrace_memory_fault_exits",
        "KVM_RUN calls that came back to the VMM with a memory fault.",
        labels=["vm", "errno", "cause"],
    )
    sigbus = CounterMetricFamily(
        "kvmtrace_sigbus",
        "SIGBUS to the VMM for poisoned memory: AR (action required) or AO (action optional).",
        labels=["vm", "code"],
    )
    pages = GaugeMetricFamily(
        "kvmtrace_vm_poisoned_pages", "Poisoned pages that the VM holds now.", labels=["vm"]
    )
    undelivered = CounterMetricFamily(
        "kvmtrace_undelivered",
        "Times guest_memfd refused a poisoned page and KVM_RUN did not tell the VMM.",
        labels=["vm"],
    )
    for one in series:
        vm = one.vm
        if vm is not None:
            who = {"name": clean(vm.name), "uuid": clean(vm.uuid), "vmm": clean(vm.vmm)}
            info.add_metric([one.label], {**who, "pid": str(vm.pid)})
        for (errno, cause), count in one.exits.items():
            exits.add_metric([one.label, errno, cause], count)
        for code, count in one.sigbus.items():
            sigbus.add_metric([one.label, code], count)
        pages.add_metric([one.label], one.poisoned_pages)
        undelivered.add_metric([one.label], one.undelivered)
    return iter((info, exits, sigbus, pages, undelivered))


def serve(
    listen: str,
    session: Snapshots,
    *,
    kinds: Kinds = lambda: FALLBACK_KINDS,
    max_vms: int = DEFAULT_MAX_VMS,
    now: Callable[[], int] = clock.now_ns,
) -> Server:
    """Serve ``/metrics``, ``/-/healthy`` and a landing page until ``close()`` of what it returns.

    ``now``: ns since the epoch, by the clock that stamps the session's events.

    Raises UsageError if ``listen`` makes no sense, KvmtraceError if it cannot be listened on.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Exporter(session.snapshot, kinds=kinds, max_vms=max_vms))
    ProcessCollector(registry=registry)  # what kvmtrace itself costs: process_cpu_seconds_total …
    metrics = cast("WSGIApplication", make_wsgi_app(registry))

    def everything(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        # Without "?name[]=…", which finds nothing in a registry that was not described.
        return metrics({**environ, "QUERY_STRING": ""}, start_response)

    def healthy(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            session.snapshot()
        except BaseException as failure:
            answer = text(HTTPStatus.SERVICE_UNAVAILABLE, f"not healthy: {_reason(failure)}\n")
        else:
            answer = text(HTTPStatus.OK, "kvmtrace is healthy\n")
        return answer(environ, start_response)

    def landing(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            snapshot = session.snapshot()
        except BaseException as failure:
            body = page.render_failure(_reason(failure))
            answer = text(HTTPStatus.SERVICE_UNAVAILABLE, body, "text/html")
        else:
            answer = text(HTTPStatus.OK, page.render(snapshot, now()), "text/html")
        return answer(environ, start_response)

    return start(listen, {"/metrics": everything, "/-/healthy": healthy, "/": landing})


def _reason(failure: BaseException) -> str:
    """One line on what ended the source."""
    if isinstance(failure, KvmtraceError):
        return failure.message
    return f"{type(failure).__name__}: {failure}".splitlines()[0]
