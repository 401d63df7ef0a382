"""The exporter's contract: names, births at 0, series that always mean one VM."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvmtrace.errors import KvmtraceError
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
from kvmtrace.views.web import metrics, vm_incidents
from kvmtrace.views.web.vm_labels import VmLabels
from tests.exporter_scenario import CONVERSIONS, LOOPS, START, Scenario
from tests.unit import serving
from tests.unit.fake import FakeSource
from tests.unit.web_client import Beating, ask

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
    "kvmtrace_history_writable": set(),
    "kvmtrace_history_bytes": set(),
    "kvmtrace_history_events_written_total": set(),
    "kvmtrace_history_events_waiting": set(),
    "kvmtrace_history_events_dropped_total": {"reason"},
    "kvmtrace_history_events_deleted_total": {"reason"},
    "kvmtrace_history_write_errors_total": set(),
    "kvmtrace_history_last_write_timestamp_seconds": set(),
    "kvmtrace_history_oldest_event_timestamp_seconds": set(),
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


def test_vms_of_one_name_have_labels_with_their_number() -> None:
    vms = {
        1: dataclasses.replace(vm(1, "simple"), vmid="8006"),
        2: dataclasses.replace(vm(2, "simple"), vmid="8007"),
        3: vm(3, "simple"),
    }
    labels = [one.label for one in VmLabels(9).series(vms)[0]]
    assert labels == ["simple-8006", "simple-8007", "simple-1003"]


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
