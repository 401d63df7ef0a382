"""The exporter's contract: names, births at 0, series that always mean one VM, and its server."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import http.client
import re
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from http import HTTPStatus
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvmtrace.errors import KvmtraceError, UsageError
from kvmtrace.events import Owner
from kvmtrace.judgement.urgency import Urgency
from kvmtrace.model import (
    CAUSES,
    Incident,
    IncidentStatus,
    Latency,
    Notification,
    Snapshot,
    Verdict,
    VerdictWord,
    Vm,
    VmIdentity,
)
from kvmtrace.session.session import Session
from kvmtrace.sources.bpf.records import LOST_PLACES
from kvmtrace.sources.limits import RING_KIB
from kvmtrace.views.web import answers, metrics, pages, vm_incidents
from kvmtrace.views.web import server as server_module
from kvmtrace.views.web.answers import Answer
from kvmtrace.views.web.listening import parse_listen
from kvmtrace.views.web.server import Server
from kvmtrace.views.web.vm_labels import VmLabels
from tests.exporter_scenario import CONVERSIONS, LOOPS, START, Scenario
from tests.unit import serving
from tests.unit.fake import FakeSource

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]

CONTRACT = {
    "kvmtrace_build_info": {"version"},
    "kvmtrace_vm_info": {"vm", "name", "uuid", "pid", "vmm"},
    "kvmtrace_memory_fault_exits_total": {"vm", "errno", "cause"},
    "kvmtrace_poison_events_total": {"page_type", "result"},
    "kvmtrace_undelivered_total": {"vm"},
    "kvmtrace_incident_verdicts": {"verdict"},
    "kvmtrace_vm_poisoned_pages": {"vm"},
    "kvmtrace_incidents": {"state"},
    "kvmtrace_kernel_poisoned_pages": set(),
    "kvmtrace_host_at_risk": set(),
    "kvmtrace_incident_urgencies": {"urgency"},
    "kvmtrace_vm_incidents": {"vm", "state"},
    "kvmtrace_vm_verdicts": {"vm", "verdict"},
    "kvmtrace_sigbus_total": {"vm", "code"},
    "kvmtrace_poison_to_delivery_seconds_bucket": {"le"},
    "kvmtrace_poison_to_delivery_seconds_sum": set(),
    "kvmtrace_poison_to_delivery_seconds_count": set(),
    "kvmtrace_events_lost_total": {"where"},
    "kvmtrace_clock_steps_total": set(),
    "kvmtrace_probe_attached": {"probe"},
    "kvmtrace_probe_runs_total": {"probe"},
    "kvmtrace_probe_run_seconds_total": {"probe"},
    "kvmtrace_scrape_collector_success": {"collector"},
    "kvmtrace_source_info": {"source", "why"},
    "kvmtrace_hardware_corrupted_bytes": set(),
    "kvmtrace_vms_folded": set(),
}


def vm(key: int, name: str | None = None, pid: int | None = None, **fields: object) -> Vm:
    """A VM to which nothing has happened, unless ``fields`` say so."""
    blank = Vm(key, pid or 1000 + key, name, None, None, {}, {}, 0, None, gone=False)
    return dataclasses.replace(blank, **fields)  # type: ignore[arg-type]


def vms(*some: Vm) -> Snapshot:
    return Snapshot(vms={one.key: one for one in some})


def scrape(collector: metrics.Exporter) -> Series:
    """All samples of one scrape; a sample twice is an error in itself."""
    series: Series = {}
    for family in collector.collect():
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in series
            series[key] = sample.value
    return series


def value(series: Series, metric: str, **labels: str) -> float:
    return series[metric, frozenset(labels.items())]


def labels_of(series: Series, metric: str) -> set[str]:
    return {dict(labels)["vm"] for name, labels in series if name == metric}


def above_0(series: Series, metric: str) -> dict[tuple[str, ...], float]:
    """{label values, in the order of the labels' names: value}, without zeros."""
    return {
        tuple(value for _, value in sorted(labels)): count
        for (name, labels), count in series.items()
        if name == metric and count
    }


class Changing:
    """A snapshot callable whose snapshot is set by the test."""

    def __init__(self, now: Snapshot) -> None:
        self.now = now

    def __call__(self) -> Snapshot:
        return self.now


# -- contract


def test_names_and_labels_are_the_contract() -> None:
    series = scrape(metrics.Exporter(Scenario().begin().happen().snapshot))
    found: dict[str, set[str]] = {}
    for name, labels in series:
        found.setdefault(name, {key for key, _ in labels})
    assert found == CONTRACT


def test_scenario_in_numbers() -> None:
    series = scrape(metrics.Exporter(Scenario().begin().happen().snapshot))
    exits = "kvmtrace_memory_fault_exits_total"
    assert value(series, exits, vm="web", errno="EHWPOISON", cause="hwpoison") == LOOPS
    assert value(series, exits, vm="vm-103", errno="EFAULT", cause="conversion") == CONVERSIONS
    assert value(series, exits, vm="db", errno="EHWPOISON", cause="hwpoison") == 0
    assert value(series, "kvmtrace_sigbus_total", vm="db", code="AO") == 1
    assert value(series, "kvmtrace_vm_poisoned_pages", vm="web") == 1
    assert value(series, "kvmtrace_vm_poisoned_pages", vm="db") == 2
    assert value(series, "kvmtrace_kernel_poisoned_pages") == 1
    assert value(series, "kvmtrace_host_at_risk") == 1
    urgencies = {(word,): 1 for word in ("looping", "unclear", "latent", "kernel")}
    assert above_0(series, "kvmtrace_incident_urgencies") == urgencies
    assert above_0(series, "kvmtrace_vm_incidents") == {
        ("looping", "web"): 1,
        ("delivered", "db"): 1,
        ("latent", "db"): 1,
    }
    assert above_0(series, "kvmtrace_vm_verdicts") == {("looping", "web"): 1, ("unknown", "db"): 1}
    assert value(series, "kvmtrace_incidents", state=IncidentStatus.UNOWNED) == 1
    assert value(series, "kvmtrace_incidents", state=IncidentStatus.DELIVERED) == 1
    assert value(series, "kvmtrace_incidents", state=IncidentStatus.LOOPING) == 1
    assert value(series, "kvmtrace_incidents", state=IncidentStatus.LATENT) == 1
    assert value(series, "kvmtrace_events_lost_total", where="ring") == 7
    assert value(series, "kvmtrace_hardware_corrupted_bytes") == 8192
    latency = "kvmtrace_poison_to_delivery_seconds"
    assert value(series, f"{latency}_bucket", le="0.1") == 1
    assert value(series, f"{latency}_bucket", le="1.0") == 2
    assert value(series, f"{latency}_bucket", le="+Inf") == 2
    assert value(series, f"{latency}_sum") == pytest.approx(0.25)
    assert value(series, "kvmtrace_probe_attached", probe="mce") == 0
    assert value(series, "kvmtrace_probe_run_seconds_total", probe="run") == pytest.approx(0.040208)


def test_nothing_that_is_an_address_or_a_number_is_a_label() -> None:
    series = scrape(metrics.Exporter(Scenario().begin().happen().snapshot))
    names = {key for _, labels in series for key, _ in labels}
    assert not names & {"pfn", "gpa", "gfn", "hva", "tid", "addr"}
    text = repr([sorted(labels) for _, labels in series]).lower()
    assert not re.search(r"abc123|0x105|105000|7f00", text)


def test_an_errno_or_code_without_a_name_is_other() -> None:
    strange = vm(1, "a", exits={("4095", "other"): 2, ("524", "other"): 3}, sigbus={"9": 1})
    series = scrape(metrics.Exporter(lambda: vms(strange)))
    exits = "kvmtrace_memory_fault_exits_total"
    assert value(series, exits, vm="a", errno="other", cause="other") == 5
    assert value(series, "kvmtrace_sigbus_total", vm="a", code="other") == 1


def test_an_exit_of_unknown_cause() -> None:
    series = scrape(metrics.Exporter(lambda: vms(vm(1, "a", exits={("EFAULT", None): 4}))))
    exits = "kvmtrace_memory_fault_exits_total"
    assert value(series, exits, vm="a", errno="EFAULT", cause="unknown") == 4


# -- births at 0


def test_counters_of_a_vm_are_there_before_anything_happens() -> None:
    series = scrape(metrics.Exporter(Scenario().begin().snapshot))
    for label in ("web", "db", "vm-103"):
        for cause in set(CAUSES) - {"other"}:
            errno = "EHWPOISON" if cause == "hwpoison" else "EFAULT"
            exits = "kvmtrace_memory_fault_exits_total"
            assert value(series, exits, vm=label, errno=errno, cause=cause) == 0
        for code in ("AR", "AO", "KERNEL"):
            assert value(series, "kvmtrace_sigbus_total", vm=label, code=code) == 0
        assert value(series, "kvmtrace_vm_poisoned_pages", vm=label) == 0
        for state in (*IncidentStatus, "undelivered"):
            assert value(series, "kvmtrace_vm_incidents", vm=label, state=state) == 0
        for verdict in VerdictWord:
            assert value(series, "kvmtrace_vm_verdicts", vm=label, verdict=verdict) == 0


def test_counters_of_the_host_are_there_before_anything_happens() -> None:
    series = scrape(metrics.Exporter(Snapshot))
    assert value(series, "kvmtrace_host_at_risk") == 0
    for urgency in Urgency:
        assert value(series, "kvmtrace_incident_urgencies", urgency=urgency) == 0
    for state in IncidentStatus:
        assert value(series, "kvmtrace_incidents", state=state) == 0
    rings = [f"ftrace_{ring}" for ring in RING_KIB]
    for where in (*LOST_PLACES, *rings, "ftrace_missed", "signal_counts", "incidents", "vms"):
        assert value(series, "kvmtrace_events_lost_total", where=where) == 0
    poisons = [v for (name, _), v in series.items() if name == "kvmtrace_poison_events_total"]
    assert poisons
    assert not any(poisons)
    assert value(series, "kvmtrace_poison_to_delivery_seconds_count") == 0


def test_the_kernels_own_kinds_of_poison_are_born_at_0() -> None:
    kind = ("guest_memfd page", "Recovered")
    collector = metrics.Exporter(Snapshot, kinds=lambda: [kind])
    labels = {"page_type": kind[0], "result": kind[1]}
    assert value(scrape(collector), "kvmtrace_poison_events_total", **labels) == 0
    collector = metrics.Exporter(lambda: Snapshot(poisons={kind: 1}), kinds=lambda: [kind])
    assert value(scrape(collector), "kvmtrace_poison_events_total", **labels) == 1


def test_a_kernel_without_a_list_of_kinds_costs_no_incident() -> None:
    def unreadable() -> list[tuple[str, str]]:
        raise PermissionError

    series = scrape(metrics.Exporter(Scenario().begin().happen().snapshot, kinds=unreadable))
    assert value(series, "kvmtrace_scrape_collector_success", collector="kinds") == 0
    assert value(series, "kvmtrace_incidents", state=IncidentStatus.LOOPING) == 1
    labels = {"page_type": "unknown page", "result": "Failed"}
    assert value(series, "kvmtrace_poison_events_total", **labels) == 0


def test_an_incident_state_from_the_future_is_exported() -> None:
    paused: Any = "paused"
    future = Incident("1-1", paused, None, None, None, None, ())
    series = scrape(metrics.Exporter(lambda: Snapshot(incidents=(future,))))
    assert value(series, "kvmtrace_incidents", state="paused") == 1


# -- labels: one series, one VM

INFO = "kvmtrace_vm_info"


def test_vms_of_one_name_never_share_a_series() -> None:
    series = scrape(metrics.Exporter(lambda: vms(vm(1, "a", 10), vm(2, "a", 11), vm(3, "b"))))
    assert labels_of(series, INFO) == {"a-10", "a-11", "b"}


def test_a_label_stays_when_a_second_vm_takes_the_name() -> None:
    now = Changing(vms(vm(1, "a", 10)))
    collector = metrics.Exporter(now)
    assert labels_of(scrape(collector), INFO) == {"a"}
    dead = vm(1, "a", 10, gone=True, exits={("EHWPOISON", "hwpoison"): 3})
    now.now = vms(dead, vm(2, "a", 11))
    series = scrape(collector)
    assert labels_of(series, INFO) == {"a", "a-11"}
    exits = "kvmtrace_memory_fault_exits_total"
    assert value(series, exits, vm="a", errno="EHWPOISON", cause="hwpoison") == 3
    assert value(series, exits, vm="a-11", errno="EHWPOISON", cause="hwpoison") == 0


@pytest.mark.parametrize(
    ("some", "expected"),
    [
        ([vm(1, None, 7), vm(2, None, 7)], {"vm-7", "vm-7-2"}),  # one process, two VMs
        ([vm(1, "other", 7)], {"other-7"}),  # the name of the sum
        ([vm(1, "a-2", 9), vm(2, "a", 1), vm(3, "a", 2)], {"a-2", "a-1", "a-2-2"}),
        ([vm(1, "vm-8", 9), vm(2, None, 8)], {"vm-8", "vm-8-2"}),
        ([vm(1, "x" * 500, 9)], {"x" * 128}),
        ([vm(1, "x" * 500, 9), vm(2, "x" * 600, 10)], {"x" * 128 + "-9", "x" * 128 + "-10"}),
        ([vm(1, "a\udc80\n\x1b[31m\u202eb", 9)], {"a[31mb"}),
    ],
)
def test_labels(some: list[Vm], expected: set[str]) -> None:
    assert labels_of(scrape(metrics.Exporter(lambda: vms(*some))), INFO) == expected


def test_a_name_learned_late_is_taken_while_nothing_is_counted() -> None:
    now = Changing(vms(vm(1, None, 7), vm(2, None, 8)))
    collector = metrics.Exporter(now)
    assert labels_of(scrape(collector), INFO) == {"vm-7", "vm-8"}
    now.now = vms(vm(1, "a", 7), vm(2, "b", 8, sigbus={"AR": 1}))
    assert labels_of(scrape(collector), INFO) == {"a", "vm-8"}


def test_a_forgotten_vm_leaves_its_label() -> None:
    now = Changing(vms(vm(1, "a", 10)))
    collector = metrics.Exporter(now)
    scrape(collector)
    now.now = vms(vm(2, "a", 11))
    assert labels_of(scrape(collector), INFO) == {"a"}


def test_a_forgotten_vm_takes_its_label_along_if_it_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or the counter would go down within one scrape interval."""
    monkeypatch.setattr("kvmtrace.views.web.vm_labels.MAX_RETIRED", 2)
    conversion = {("EFAULT", "conversion"): 2}
    now = Changing(vms(vm(1, "a", 10, exits=conversion)))
    collector = metrics.Exporter(now)
    scrape(collector)
    for key, pid, label in ((2, 11, "a-11"), (3, 11, "a-11-2"), (4, 12, "a")):
        now.now = vms(vm(key, "a", pid, exits=conversion))
        assert labels_of(scrape(collector), INFO) == {label}
    # The first had been remembered until two others were.


def test_vms_beyond_the_limit_are_summed_and_it_says_so() -> None:
    hit = {("EFAULT", "conversion"): 5}
    now = Changing(vms(*(vm(key, f"v{key}", exits=hit) for key in range(5))))
    collector = metrics.Exporter(now, max_vms=2)
    exits = "kvmtrace_memory_fault_exits_total"

    series = scrape(collector)
    assert labels_of(series, exits) == {"v0", "v1", "other"}
    assert labels_of(series, INFO) == {"v0", "v1"}
    assert value(series, "kvmtrace_vms_folded") == 3
    assert value(series, exits, vm="other", errno="EFAULT", cause="conversion") == 15
    assert value(series, exits, vm="other", errno="EHWPOISON", cause="hwpoison") == 0

    # Forgotten and promoted VMs must not take counts out of "other".
    now.now = vms(vm(0, "v0", exits=hit), vm(4, "v4", exits=hit), vm(9, "new"))
    series = scrape(collector)
    assert labels_of(series, exits) == {"v0", "new", "other"}
    assert value(series, exits, vm="other", errno="EFAULT", cause="conversion") == 15
    assert value(series, "kvmtrace_vms_folded") == 1


def test_incidents_of_vms_beyond_the_limit_are_summed() -> None:
    pages = [Incident(f"{n}-1", LATENT, n, None, None, None, (Owner(n, n),)) for n in range(5)]
    now = Changing(vms(*(vm(key, f"v{key}") for key in range(5))))
    now.now = dataclasses.replace(now.now, incidents=tuple(pages))
    collector = metrics.Exporter(now, max_vms=2)
    latent = {("latent", "v0"): 1, ("latent", "v1"): 1, ("latent", "other"): 3}
    assert above_0(scrape(collector), "kvmtrace_vm_incidents") == latent

    # v3 is forgotten, and v4 has the place of v0.
    now.now = dataclasses.replace(now.now, vms={key: now.now.vms[key] for key in (1, 2, 4)})
    latent = {("latent", "v1"): 1, ("latent", "v2"): 1, ("latent", "other"): 1}
    assert above_0(scrape(collector), "kvmtrace_vm_incidents") == latent


def test_no_other_without_need() -> None:
    series = scrape(metrics.Exporter(lambda: vms(vm(1, "a")), max_vms=1))
    assert value(series, "kvmtrace_vms_folded") == 0
    assert labels_of(series, "kvmtrace_vm_poisoned_pages") == {"a"}


# -- incidents by VM

LATENT = IncidentStatus.LATENT


def notified(vm: int) -> Notification:
    return Notification(vm, 0, 1, {}, START, START)


def signalled(vm: int) -> Notification:
    return Notification(vm, None, 0, {"AO": 1}, START, START)


def shared(state: IncidentStatus, *owners: int, **fields: object) -> Incident:
    """A page that these VMs own, each at its own place."""
    page = Incident("1-1", state, 1, None, None, None, tuple(Owner(n, n, n << 12) for n in owners))
    return dataclasses.replace(page, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("incident", "expected"),
    [
        # One of two VMs loops; the other has not touched the page.
        (
            shared(
                IncidentStatus.LOOPING,
                1,
                2,
                notifications=(notified(1),),
                verdicts=(Verdict(1, VerdictWord.LOOPING, ()),),
                first_delivery_ts=START,
            ),
            {1: "looping", 2: "latent"},
        ),
        # Only one of them is gone.
        (
            shared(LATENT, 1, 2, vm_identities={1: VmIdentity(1, 7, gone_ts=START)}),
            {1: "closed", 2: "latent"},
        ),
        (shared(IncidentStatus.CLOSED, 1), {1: "closed"}),
        # A VM without a place that is known was notified.
        (
            shared(
                IncidentStatus.DELIVERED,
                notifications=(notified(1),),
                verdicts=(Verdict(1, VerdictWord.STOPPED, ()),),
                first_delivery_ts=START,
            ),
            {1: "delivered"},
        ),
        (shared(LATENT, 1, undelivered=3), {1: "undelivered"}),
        # Refused, and then the VMM was notified after all.
        (
            shared(
                IncidentStatus.DELIVERED,
                1,
                exits=1,
                undelivered=3,
                notifications=(notified(1),),
                first_delivery_ts=START,
            ),
            {1: "delivered"},
        ),
        # Notified ahead of time by a signal, and then refused.
        (
            shared(
                IncidentStatus.DELIVERED,
                1,
                undelivered=3,
                sigbus=1,
                notifications=(signalled(1),),
                verdicts=(Verdict(1, VerdictWord.UNKNOWN, ()),),
                first_delivery_ts=START,
            ),
            {1: "undelivered"},
        ),
        # A process was notified, and it is not known for which of its VMs.
        (
            shared(IncidentStatus.DELIVERED, 1, 2, sigbus=1, first_delivery_ts=START),
            {1: "delivered", 2: "delivered"},
        ),
        # It has another page in place of the poisoned one.
        (shared(IncidentStatus.UNOWNED, 1, released=(Owner(1, 1, 1 << 12),)), {1: "unowned"}),
        (shared(IncidentStatus.UNOWNED), {}),
        # The same after it was notified: nothing is left to do, whatever it did.
        (
            shared(
                IncidentStatus.DELIVERED,
                1,
                released=(Owner(1, 1, 1 << 12),),
                notifications=(signalled(1),),
                verdicts=(Verdict(1, VerdictWord.UNKNOWN, ()),),
                first_delivery_ts=START,
            ),
            {1: "delivered"},
        ),
    ],
)
def test_the_state_of_an_incident_for_each_vm(incident: Incident, expected: dict[int, str]) -> None:
    assert vm_incidents.states(incident) == expected
    some = vms(*(vm(key, f"v{key}") for key in (1, 2)))
    snapshot = dataclasses.replace(some, incidents=(incident,))
    series = scrape(metrics.Exporter(lambda: snapshot))
    exported = above_0(series, "kvmtrace_vm_incidents")
    assert exported == {(state, f"v{key}"): 1 for key, state in expected.items()}
    judged = () if incident.released else incident.verdicts
    words = {(str(one.word), f"v{one.vm}"): 1.0 for one in judged}
    assert above_0(series, "kvmtrace_vm_verdicts") == words


# -- what fails


def test_a_dead_source_leaves_build_info_and_says_so() -> None:
    def dead() -> Snapshot:
        raise SystemExit(1)

    series = scrape(metrics.Exporter(dead))
    assert value(series, "kvmtrace_scrape_collector_success", collector="snapshot") == 0
    assert {name for name, _ in series} == {
        "kvmtrace_build_info",
        "kvmtrace_scrape_collector_success",
    }


def test_one_part_that_fails_leaves_the_others() -> None:
    broken = Snapshot(latency=Latency(counts=()))
    series = scrape(metrics.Exporter(lambda: broken))
    assert value(series, "kvmtrace_scrape_collector_success", collector="incidents") == 0
    assert value(series, "kvmtrace_scrape_collector_success", collector="vms") == 1
    assert not [name for name, _ in series if name == "kvmtrace_incidents"]


# -- the server


class Fake:
    """What ``serve`` needs of a live.Session."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self.snapshot = snapshot


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = serving.serve("127.0.0.1:0", Scenario().begin().happen())
    yield running
    running.close()


def ask(
    server: Server, path: str, method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def test_metrics_parse(server: Server) -> None:
    response, body = ask(server, "/metrics")
    assert response.status == 200
    assert response.getheader("Content-Type", "").startswith("text/plain")
    names = {family.name for family in text_string_to_metric_families(body.decode())}
    assert "kvmtrace_memory_fault_exits" in names
    assert "process_cpu_seconds" in names
    assert b"_created" not in body.replace(b"process_", b"")


def test_metrics_in_openmetrics_and_gzip(server: Server) -> None:
    accept = {"Accept": "application/openmetrics-text; version=1.0.0", "Accept-Encoding": "gzip"}
    response, body = ask(server, "/metrics?name[]=x", **accept)
    assert response.getheader("Content-Type", "").startswith("application/openmetrics-text")
    assert response.getheader("Content-Encoding") == "gzip"
    plain = gzip.decompress(body)
    assert plain.endswith(b"# EOF\n")
    assert (
        b'kvmtrace_memory_fault_exits_total{cause="hwpoison",errno="EHWPOISON",vm="web"}' in plain
    )


@pytest.mark.parametrize("path", ["/metric", "/metrics/", "/events", "/favicon.ico", "/../x"])
def test_anything_else_is_not_found(server: Server, path: str) -> None:
    assert ask(server, path)[0].status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_only_get_and_head(server: Server, method: str) -> None:
    response, _ = ask(server, "/metrics", method)
    assert response.status == 405
    assert response.getheader("Allow") == "GET, HEAD"


@pytest.mark.parametrize("path", ["/", "/metrics", "/-/healthy"])
def test_head_is_get_without_the_body(server: Server, path: str) -> None:
    response, body = ask(server, path, "HEAD")
    assert response.status == 200
    assert int(response.getheader("Content-Length", "0")) > 0
    assert body == b""


def test_healthy(server: Server) -> None:
    response, body = ask(server, "/-/healthy")
    assert (response.status, body) == (200, b"kvmtrace is healthy\n")


def test_a_dead_source_over_http() -> None:
    def dead() -> Snapshot:
        raise KvmtraceError("the kernel <took> it away", "hint")

    server = serving.serve("127.0.0.1:0", Fake(dead))
    try:
        response, body = ask(server, "/-/healthy")
        assert response.status == 503
        assert body == b"not healthy: the kernel <took> it away\n"
        response, body = ask(server, "/metrics")
        assert response.status == 200
        assert b'kvmtrace_scrape_collector_success{collector="snapshot"} 0.0' in body
        assert b"kvmtrace_build_info{" in body
        response, body = ask(server, "/")
        assert response.status == 503
        assert b"&lt;took&gt;" in body
    finally:
        server.close()


def test_the_page_tells_the_story_and_escapes_it() -> None:
    evil = vm(7, "<script>alert(1)</script>", exits={("EFAULT", None): 1})
    story = Scenario().begin().happen().snapshot()
    both = dataclasses.replace(story, vms={**story.vms, 7: evil})
    server = serving.serve("127.0.0.1:0", Fake(lambda: both))
    try:
        response, body = ask(server, "/")
    finally:
        server.close()
    page = body.decode()
    assert response.getheader("Content-Type") == "text/html; charset=utf-8"
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    for word in (
        "host1",
        "6.18.0-test",
        "bpf works here",
        "looping",
        ">web</a>",
        "abc123-1",
    ):
        assert word in page
    assert page.index("looping") < page.index("latent")


def test_the_page_names_an_owner_that_is_gone() -> None:
    """Also one whose VM the model has forgotten, its incident not."""
    party = VmIdentity(9, 4009, "mail", gone_ts=START)
    story = Scenario().begin().snapshot()
    owners = (Owner(9, 0x77), Owner(10, 0x78))
    lost = Incident(
        "1f-1", IncidentStatus.CLOSED, 0x1F, "a", "b", START, owners, vm_identities={9: party}
    )
    server = serving.serve(
        "127.0.0.1:0", Fake(lambda: dataclasses.replace(story, incidents=(lost,)))
    )
    try:
        page = ask(server, "/")[1].decode()
    finally:
        server.close()
    assert "mail +1" in page


def test_vms_of_one_name_have_labels_with_their_number() -> None:
    vms = {
        1: dataclasses.replace(vm(1, "simple"), vmid="8006"),
        2: dataclasses.replace(vm(2, "simple"), vmid="8007"),
        3: vm(3, "simple"),
    }
    labels = [one.label for one in VmLabels(9).series(vms)[0]]
    assert labels == ["simple-8006", "simple-8007", "simple-1003"]


def test_idle_clients_do_not_hold_up_a_scrape(server: Server) -> None:
    idle = [socket.create_connection(server.address) for _ in range(20)]
    idle[0].sendall(b"GET /metrics HTT")
    try:
        assert ask(server, "/metrics")[0].status == 200
        # They are still connected: nobody was thrown out to make room.
        for one in idle:
            one.setblocking(False)
            with pytest.raises(BlockingIOError):
                one.recv(1)
    finally:
        for one in idle:
            one.close()


def test_port_in_use_is_one_line_with_a_hint(server: Server) -> None:
    listen = f"127.0.0.1:{server.address[1]}"
    with pytest.raises(KvmtraceError, match=rf"^cannot listen on {listen}: port in use$") as error:
        serving.serve(listen, Scenario())
    assert "--listen" in error.value.hint
    assert error.value.exit_status == 1


def test_close_frees_the_port_and_may_be_called_twice() -> None:
    server = serving.serve("127.0.0.1:0", Scenario())
    server.close()
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(server.address)


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(KvmtraceError, match="not an address of this host"):
        serving.serve("192.0.2.1:0", Scenario())


OTHERS = ("evil.example", "evil.example:9750", "localhost.evil.example", "127.0.0.1.evil.example")
OURS = ("localhost", "LOCALHOST:9750", "localhost.", "a.localhost:1", "127.0.0.1:80", "[::1]:9750")


@pytest.mark.parametrize("path", ["/metrics", "/-/healthy", "/", "/nothing"])
@pytest.mark.parametrize("host", OTHERS)
def test_on_loopback_it_is_not_asked_for_by_other_names(
    server: Server, host: str, path: str
) -> None:
    """A page whose own name resolves to 127.0.0.1 may read what it asks for (DNS rebinding)."""
    response, body = ask(server, path, Host=host)
    assert response.status == 421
    assert b"--allow-host" in body


@pytest.mark.parametrize("host", [*OURS, socket.gethostname()])
def test_on_loopback_it_is_asked_for_by_its_own_names(server: Server, host: str) -> None:
    assert ask(server, "/metrics", Host=host)[0].status == 200


def test_two_hosts_are_refused(server: Server) -> None:
    with socket.create_connection(server.address, timeout=20) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: evil.example\r\nHost: localhost\r\n\r\n")
        assert client.makefile("rb").readline().split()[1] == b"400"


def test_names_given_are_its_own() -> None:
    server = serving.serve("localhost:0", Scenario(), names=("Metrics.example",))
    try:
        for host, status in (("metrics.example:443", 200), ("other.example", 421)):
            assert ask(server, "/-/healthy", Host=host)[0].status == status
    finally:
        server.close()


def test_who_listens_for_others_is_asked_for_by_any_name() -> None:
    server = serving.serve(":0", Scenario())
    try:
        with socket.create_connection(("127.0.0.1", server.address[1]), timeout=20) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: kvm-host.example\r\n\r\n")
            assert client.makefile("rb").readline().split()[1] == b"200"
    finally:
        server.close()


def test_no_answer_says_what_serves_it(server: Server) -> None:
    for path in ("/metrics", "/", "/nothing"):
        assert ask(server, path)[0].getheader("Server") is None


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize(("listen", "host"), [("[::1]:0", "::1"), (":0", "127.0.0.1")])
def test_ipv6_and_every_address(listen: str, host: str) -> None:
    server = serving.serve(listen, Scenario())
    try:
        connection = http.client.HTTPConnection(host, server.address[1], timeout=20)
        connection.request("GET", "/-/healthy")
        assert connection.getresponse().status == 200
        connection.close()
    finally:
        server.close()


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:9750", ("127.0.0.1", 9750)),
        ("9750", ("127.0.0.1", 9750)),
        ("localhost:0", ("localhost", 0)),
        (":9750", ("", 9750)),
        ("[::1]:9750", ("::1", 9750)),
        ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1)),
    ],
)
def test_listen(listen: str, expected: tuple[str, int]) -> None:
    assert parse_listen(listen) == expected


@pytest.mark.parametrize(
    "listen",
    " |٩٧٥٠|-1|65536|host|host:|host:http|host:65536|host:-1|host:+1|host:٩٧٥٠|host:1:2|a b:1|"
    "u@h:1|::1:9750|[::1]|[]:1|[host]:1|http://host:1".split("|"),
)
def test_listen_on_nonsense(listen: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_listen(listen)
    assert "\n" not in error.value.message
    assert "127.0.0.1:9750" in error.value.hint


# -- bounded, for any client


def connect(server: Server, peer: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(server.address, timeout=20, source_address=(peer, 0))


def is_open(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    finally:
        client.settimeout(20)


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.0\r\nX: "])
def test_a_client_that_does_not_come_to_the_point_is_let_go_quietly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], sent: bytes
) -> None:
    """However often it sends a little more."""
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.3)
    server = serving.serve("127.0.0.1:0", Scenario())
    try:
        with connect(server) as slow:
            slow.sendall(sent)
            while is_open(slow):
                if sent:
                    with contextlib.suppress(ConnectionError):
                        slow.sendall(b"a")
                select.select([slow], [], [], 0.02)
        assert server.dropped["deadline"] == 1
    finally:
        server.close()
    assert capfd.readouterr().err == ""


def test_a_client_that_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "ANSWER_SECONDS", 0.3)
    big = b"x" * (64 << 20)  # more than any socket's buffers
    server = serving.start("127.0.0.1:0", {"/": lambda headers: Answer(HTTPStatus.OK, big)})
    try:
        with connect(server) as stuck:
            stuck.sendall(b"GET / HTTP/1.0\r\n\r\n")
            until(lambda: server.dropped["deadline"])
    finally:
        server.close()


def test_the_oldest_idle_client_makes_room_for_one_who_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 8)
    server = serving.serve("127.0.0.1:0", Scenario())
    idle = [connect(server) for _ in range(20)]
    try:
        until(lambda: server.dropped["crowded"] == 16)
        assert idle[0].recv(1) == b""
        assert ask(server, "/metrics")[0].status == 200
        assert [is_open(one) for one in idle] == [False] * 17 + [True] * 3
    finally:
        server.close()
        for one in idle:
            one.close()


def test_one_peer_does_not_take_the_places_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 8)
    server = serving.serve("127.0.0.1:0", Scenario())
    try:
        with connect(server) as patient:
            greedy = [connect(server, "127.0.0.2") for _ in range(20)]
            until(lambda: server.dropped["crowded"] == 16)
            assert is_open(patient)
            patient.sendall(b"GET /-/healthy HTTP/1.0\r\n\r\n")
            assert patient.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")
            for one in greedy:
                one.close()
    finally:
        server.close()


def test_connections_leave_descriptors_to_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: (40, 40)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    server = serving.serve("127.0.0.1:0", Scenario())
    idle = [connect(server) for _ in range(30)]
    try:
        until(lambda: server.dropped["crowded"] == 25)
        assert sum(map(is_open, idle)) == 5
    finally:
        server.close()
        for one in idle:
            one.close()


def test_no_descriptor_for_a_connection_is_survived_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = serving.serve("127.0.0.1:0", Scenario())
    try:
        with connect(server) as idle:
            until(lambda: server._clients)
            (listener,) = server.listeners

            class Short:
                """The listening socket, with nothing left for the next connection."""

                def __init__(self, listening: socket.socket) -> None:
                    self._listening = listening
                    self.fileno = listening.fileno
                    self.close = listening.close

                def accept(self) -> tuple[socket.socket, object]:
                    monkeypatch.setattr(listener, "listening", self._listening)
                    raise OSError(errno.EMFILE, "Too many open files")

            monkeypatch.setattr(
                server.listeners[0], "listening", Short(server.listeners[0].listening)
            )
            response, body = ask(server, "/metrics")
            assert response.status == 200
            assert b'kvmtrace_http_connections_dropped_total{why="descriptors"} 1.0' in body
            assert idle.recv(1) == b""  # its descriptor was needed
    finally:
        server.close()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.0\r\n" + b"X: " + b"a" * 9000, 431),
        (b"GET / HTTP/1.0\r\n" + b"X: a\r\n" * 3000 + b"\r\n", 431),
        (b"hello\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\xff\x00 \xff \xff\r\n:\r\n\r\n", 400),
        (
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
            + b"a" * 100_000,
            405,
        ),
        (b"GET / HTTP/1.0\n\n", 200),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # without a Host
    ],
)
def test_requests_that_are_none(server: Server, sent: bytes, status: int) -> None:
    with connect(server) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)
        answer = b""
        while more := client.recv(1 << 16):
            answer += more
    assert answer.startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text; version=x",
        "application/openmetrics-text;version=9.9.9,text/plain",
        ";;=,=;,",
        "*/*",
    ],
)
def test_what_to_accept_is_read_with_patience(
    server: Server, capfd: pytest.CaptureFixture[str], accept: str
) -> None:
    response, body = ask(server, "/metrics", Accept=accept)
    assert (response.status, response.getheader("Content-Type", "")[:10]) == (200, "text/plain")
    assert b"kvmtrace_build_info" in body
    assert capfd.readouterr().err == ""


def test_an_answer_that_fails_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def broken(variant: Hashable) -> Answer:
        raise ZeroDivisionError

    server = serving.start("127.0.0.1:0", {"/": answers.Shared(broken)})
    try:
        response, body = ask(server, "/")
    finally:
        server.close()
    assert (response.status, body) == (500, b"internal error: ZeroDivisionError\n")
    assert capfd.readouterr().err == ""


# -- the reader is left alone


class Beating:
    """A session with a heartbeat, whose snapshots are counted."""

    def __init__(self, age: float = 0.0) -> None:
        self.snapshots = 0
        self._age = age

    def age(self) -> float:
        return self._age

    def snapshot(self) -> Snapshot:
        self.snapshots += 1
        return Snapshot()


def test_one_snapshot_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "SNAPSHOT_SECONDS", 3600)
    monkeypatch.setattr(answers, "MAX_KEEP_SECONDS", 0)
    session = Beating()
    server = serving.serve("127.0.0.1:0", session)
    paths = ["/metrics", "/"] * 8
    statuses: list[int] = []
    try:
        threads = [
            threading.Thread(target=lambda path=path: statuses.append(ask(server, path)[0].status))
            for path in paths
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monkeypatch.setattr(pages, "SNAPSHOT_SECONDS", 0)
        assert statuses == [200] * len(paths)
        assert session.snapshots == 1
        ask(server, "/")
        assert session.snapshots == 2
    finally:
        server.close()


def test_one_answer_serves_all() -> None:
    made = 0
    called, go = threading.Event(), threading.Event()

    def make(variant: Hashable) -> Answer:
        nonlocal made
        made += 1
        called.set()
        go.wait(20)
        return answers.text(HTTPStatus.OK, str(made))

    server = serving.start("127.0.0.1:0", {"/": answers.Shared(make)})
    bodies: list[bytes] = []
    try:
        threads = [
            threading.Thread(target=lambda: bodies.append(ask(server, "/")[1])) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        assert called.wait(20)
        until(lambda: [one.stage for one in server._clients] == [server_module._ANSWERING] * 8)
        go.set()
        for thread in threads:
            thread.join()
    finally:
        server.close()
    assert bodies == [b"1"] * 8


# -- answers by name


class Made:
    """What makes the answers of a tree: it counts, and waits for ``go``."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.at_once = 0
        self.most_at_once = 0
        self.go = threading.Event()

    def __call__(self, name: str) -> Answer:
        self.names.append(name)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.go.wait(20)
        self.at_once -= 1
        if name == "broken":
            raise ZeroDivisionError
        return answers.text(HTTPStatus.OK, f"this is {name}")


@pytest.fixture
def tree() -> Iterator[tuple[Server, Made]]:
    made = Made()
    running = serving.start("127.0.0.1:0", {"/a/": answers.Tree(made)})
    yield running, made
    made.go.set()
    running.close()


def test_a_tree_answers_for_what_is_directly_below_it(tree: tuple[Server, Made]) -> None:
    running, made = tree
    made.go.set()
    assert ask(running, "/a/one?x=2")[1] == b"this is one"
    assert ask(running, "/a/")[1] == b"this is "
    response, body = ask(running, "/a/broken")
    assert (response.status, body) == (500, b"internal error: ZeroDivisionError\n")
    for path in ("/a", "/a/b/c", "/b/one", "/", "a/one"):
        assert ask(running, path)[0].status == 404
    response, body = ask(running, "/a/one", "HEAD")
    assert (response.status, body) == (200, b"")
    assert ask(running, "/a/one", "POST")[0].status == 405


def test_names_are_answered_one_at_a_time_and_not_without_end(tree: tuple[Server, Made]) -> None:
    running, made = tree
    room = answers.WAITING_NAMES
    bodies: list[bytes] = []

    def client(name: str) -> None:
        bodies.append(ask(running, f"/a/{name}")[1])

    # Each name is asked for twice, and made once.
    threads = [threading.Thread(target=client, args=(str(n % room),)) for n in range(2 * room)]
    for thread in threads:
        thread.start()
    until(lambda: [one.stage for one in running._clients] == [server_module._ANSWERING] * 2 * room)
    response, body = ask(running, "/a/more")
    assert (response.status, body) == (503, b"busy: try again in some seconds\n")
    made.go.set()
    for thread in threads:
        thread.join()
    assert sorted(bodies) == sorted(2 * [b"this is %d" % n for n in range(room)])
    assert sorted(made.names) == [str(n) for n in range(room)]
    assert made.most_at_once == 1
    assert ask(running, "/a/more")[1] == b"this is more"


def test_few_answers_are_kept(tree: tuple[Server, Made]) -> None:
    running, made = tree
    made.go.set()
    route = running.listeners[0].routes["/a/"]
    assert isinstance(route, answers.Tree)
    for number in range(3 * answers.KEPT_NAMES):
        assert ask(running, f"/a/{number}")[0].status == 200
    assert len(route._kept) == answers.KEPT_NAMES
    assert not route._waiting


def test_many_names_take_no_more_of_the_readers_time_than_one(
    tree: tuple[Server, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an answer, none is made for fifty times as long as it took."""
    running, made = tree
    made.go.set()
    route = running.listeners[0].routes["/a/"]
    assert isinstance(route, answers.Tree)
    monkeypatch.setattr(answers, "_made", lambda make, name: (make(name), 3600.0))
    monkeypatch.setattr(answers, "MAX_KEEP_SECONDS", 3600.0)
    assert ask(running, "/a/one")[1] == b"this is one"
    with connect(running) as second:
        second.sendall(b"GET /a/two HTTP/1.0\r\n\r\n")
        until(lambda: "two" in route._waiting)
        assert ask(running, "/a/one")[1] == b"this is one"
        assert made.names == ["one"]


def test_a_client_that_leaves_does_not_keep_others_waiting(tree: tuple[Server, Made]) -> None:
    running, made = tree
    with connect(running) as gone:
        gone.sendall(b"GET /a/one HTTP/1.0\r\n\r\n")
        until(lambda: made.names)
    made.go.set()
    assert ask(running, "/a/two")[1] == b"this is two"


def test_health_is_the_heartbeat_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """While everything else that answers is stuck."""
    session = Beating()
    go = threading.Event()

    def stuck() -> Snapshot:
        go.wait(20)
        return Snapshot()

    monkeypatch.setattr(session, "snapshot", stuck)
    server = serving.serve("127.0.0.1:0", session)
    try:
        with connect(server) as scraper:
            scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            until(lambda: [one.stage for one in server._clients] == [server_module._ANSWERING])
            assert ask(server, "/-/healthy")[0].status == 200
            session._age = pages.STALE_SECONDS + 2.4
            response, body = ask(server, "/-/healthy")
            assert response.status == 503
            assert body == b"not healthy: the source was last read 7 s ago\n"
            go.set()
            assert scraper.recv(1 << 16).startswith(b"HTTP/1.1 200")
        response, body = ask(server, "/")
        assert response.status == 503
        assert b"last read 7 s ago" in body
    finally:
        go.set()
        server.close()


def test_when_the_source_was_read_is_a_metric() -> None:
    server = serving.serve("127.0.0.1:0", Beating(age=1000.0))
    try:
        before = time.time()
        body = ask(server, "/metrics")[1].decode()
        after = time.time()
    finally:
        server.close()
    (family,) = [
        family
        for family in text_string_to_metric_families(body)
        if family.name == "kvmtrace_last_poll_timestamp_seconds"
    ]
    assert before - 1000 <= family.samples[0].value <= after - 1000


def test_a_session_has_a_heartbeat() -> None:
    session = Session(FakeSource())
    assert isinstance(session, metrics.Reader)
    session._polled -= 1000
    assert session.age() >= 1000
    session.pump(0)
    assert session.age() < 1000
    session.failure = KvmtraceError("gone")
    with pytest.raises(KvmtraceError):
        session.age()
    session.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
