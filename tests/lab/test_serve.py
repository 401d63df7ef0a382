"""`kvmtrace serve` on a real kernel, scraped by a real Prometheus and compared with the VMMs.

The module stages one sequence of events: VMs start, their memory fails, then all panels and alerts
are queried, and read as Alertmanager sends them.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvmtrace import probes
from kvmtrace.judgement.urgency import Urgency
from kvmtrace.model import VerdictWord
from tests import dashboards, prometheus
from tests.lab import leftovers
from tests.lab.conftest import Shared
from tests.lab.harness import PATIENCE, Line, Vmm, end_following, metrics_of
from tests.lab.machine import Job, Machine

pytestmark = pytest.mark.lab

TARGET = "127.0.0.1:9750"
INSTANCE = "hv-17:9750"  # as a scrape config calls a host that is scraped on loopback
WINDOW = "30m"  # for increase(): longer than all of this takes on a busy machine
STORM, AGAIN = 5000, 20
QUERY_SCRIPT = Path(__file__).with_name("guest_prometheus.py")

QUERIES = list(dashboards.queries(dashboards.load()))
VMS = ("web", "loop", "closed", "bare", "anon")


class GuestPrometheus(prometheus.Queries):
    """A Prometheus in the machine, queried through guest_prometheus.py."""

    def __init__(self, machine: Machine, directory: str, target: str) -> None:
        here = machine.share / directory
        here.mkdir()
        for path in (Path(prometheus.__file__), QUERY_SCRIPT):
            shutil.copy(path, here)
        # A loop of the lab's VMM does not last.
        (here / dashboards.ALERTS.name).write_text(dashboards.quick_alerts())
        there = f"/mnt/share/{directory}"
        self.job = machine.start(
            f"exec python3 {there}/{QUERY_SCRIPT.name} {target} {INSTANCE}"
            f" {there}/{dashboards.ALERTS.name}"
        )
        self.job.wait_for("^ready$", timeout=PATIENCE)
        self._answers = 1

    def query(self, expr: str, at: float | None = None) -> list[prometheus.Sample]:
        return [(labels, value) for labels, value in self._ask([expr, at])]

    def notified(self) -> set[str]:
        """Names of all alerts that the webhook has received: those that are over, too."""
        return {one["labels"]["alertname"] for one in self._ask(None)}

    def notified_of(self, alert: str, vm: str) -> prometheus.Notification | None:
        """What the webhook received last of an alert about a VM; None if it received nothing."""
        last = None
        for one in self._ask(None):
            if (one["labels"]["alertname"], one["labels"].get("name")) == (alert, vm):
                last = one
        return last

    def _ask(self, what: list[Any] | None) -> list[Any]:
        self.job.send(json.dumps(what) + "\n")
        self._answers += 1
        text = self.job.wait_for(lambda text: text.count("\n") >= self._answers, timeout=PATIENCE)
        answer = json.loads(text.splitlines()[self._answers - 1])
        assert isinstance(answer, list), f"{what}: {answer}"
        return answer

    def close(self) -> None:
        self.job.close_stdin()
        self.job.wait(PATIENCE)


Exits = dict[tuple[str, str, str], float]
"""{(vm, errno, cause): exits}"""


@dataclass
class Story:
    """What happened, by the VMMs' reports and the kernel's log."""

    machine: Machine
    serve: Job
    prometheus: GuestPrometheus
    before: leftovers.Attached
    attached: leftovers.Attached
    vmms: dict[str, Vmm]
    born: Exits
    old: float
    alerts_before: set[str]
    reports: Mapping[str, Line]
    poisons: Counter[tuple[str, str]]
    corrupted: int
    at: float
    """When it had happened, and the loop still counted as one."""

    @property
    def exits(self) -> Exits:
        """Returns of KVM_RUN, and the series that every VM has at 0."""
        returned = {(vm, *kind): 0.0 for vm in VMS for kind in BORN_AT_ZERO}
        for vm, report in self.reports.items():
            for row in report["failed"]:
                returned[vm, row["errno"], cause_of(row)] += row["count"]
        return returned

    def exits_by(self, vm: str, *causes: str) -> float:
        """Exits of a VM by these causes."""
        return sum(n for (who, _, cause), n in self.exits.items() if who == vm and cause in causes)

    def sigbus(self, vm: str, code: str) -> float:
        """Signals that the VMM received."""
        report = self.reports[vm]
        assert report["sigbus_not_listed"] == 0
        return float(sum(one["count"] for one in report["sigbus"] if one["code"] == code))

    def verdicts(self) -> list[tuple[str, str]]:
        """Name and verdict of each VM of each incident, as other commands show them."""
        top = json.loads(self.machine.run("kvmtrace top --once --json", check=True).stdout)
        return [
            (one["vm"]["name"], one["verdict"])
            for incident in top["incidents"]
            for one in incident.get("verdicts", ())
        ]


CODES = ("AR", "AO", "KERNEL")
BORN_AT_ZERO = (
    ("EHWPOISON", "hwpoison"),
    ("EFAULT", "conversion"),
    ("EFAULT", "userfault"),
    ("EFAULT", "backing"),
    ("EFAULT", "unannotated"),
    ("EFAULT", "unknown"),
)


def cause_of(row: Line) -> str:
    """The cause of a failed KVM_RUN; no conversions happen here."""
    if row["errno"] == "EHWPOISON":
        return "hwpoison"
    assert row["errno"] == "EFAULT", row
    return "backing" if row["annotated"] else "unannotated"


def exits_in(samples: list[prometheus.Sample]) -> Exits:
    """kvmtrace_memory_fault_exits_total as {(vm, errno, cause): exits}."""
    return {(at["vm"], at["errno"], at["cause"]): value for at, value in samples}


@pytest.fixture(scope="module")
def story(shared_machine: Shared) -> Iterator[Story]:
    machine = shared_machine.get()
    end_following(machine)  # kvmtraces of other tests would be counted as well
    before = leftovers.attached(machine)
    machine.run("sysctl -q kernel.bpf_stats_enabled=1", check=True)
    serve = machine.start(f"exec kvmtrace serve --listen {TARGET}")
    vmms: dict[str, Vmm] = {}
    scraper: GuestPrometheus | None = None
    try:
        serve.wait_for("serving http", timeout=PATIENCE, stream="stderr")
        for name in VMS:
            vmms[name] = vmm = Vmm(machine, name)
            vmm.step(f"create v backing={'anon' if name in ('bare', 'anon') else 'gmem'} pages=32")
            vmm.step("touch v +3")
        scraper = GuestPrometheus(machine, "serve", TARGET)
        exits = "kvmtrace_memory_fault_exits_total"
        scraper.wait(lambda: len(scraper.query(exits)) >= len(VMS) * len(BORN_AT_ZERO), PATIENCE)
        scraper.wait_for_scrapes(3, PATIENCE)
        born, alerts = exits_in(scraper.query(exits)), scraper.alerts()
        # Pages poisoned by earlier tests, whose VMs are gone.
        old = scraper.value('kvmtrace_incidents{state="unowned"}') or 0

        pfns = happen(vmms)
        # A loop counts as one for some seconds after its end, and verdicts on others take as long.
        scraper.wait_for_scrapes(3, PATIENCE)
        vmms["loop"].step(f"loop v +3 {AGAIN}")
        reports = {name: vmm.step("report") for name, vmm in vmms.items()}
        expected = sum(row["count"] for one in reports.values() for row in one["failed"])
        scraper.wait(lambda: (scraper.value(f"sum({exits})") or 0) >= expected, PATIENCE)
        at = scraper.value("time()")
        assert at is not None
        log = machine.run("dmesg", check=True).stdout
        yield Story(
            machine,
            serve,
            scraper,
            before,
            leftovers.attached(machine),
            vmms,
            born,
            old,
            alerts,
            reports,
            Counter(
                (kind, result)
                for pfn, kind, result in re.findall(
                    r"Memory failure: 0x([0-9a-f]+): recovery action for (.+): (\w+)", log
                )
                if int(pfn, 16) in pfns
            ),
            meminfo(machine, "HardwareCorrupted") * 1024,
            at,
        )
    finally:
        if scraper is not None:
            scraper.close()
        for vmm in vmms.values():
            vmm.job.kill()
        serve.kill()
        machine.run("sysctl -q kernel.bpf_stats_enabled=0; rm -rf /mnt/share/serve")


def happen(vmms: Mapping[str, Vmm]) -> set[int]:
    """Stage one event of each kind; return the pfns that were poisoned.

    web has two poisoned pages and has touched one, loop loops on its page, anon gets a SIGBUS,
    closed has lost its guest_memfd and bare a mapping.
    """
    poisons = [vmms["web"].step("poison v +3"), vmms["web"].step("poison v +7")]
    vmms["web"].step("touch v +3")
    poisons.append(vmms["loop"].step("poison v +3"))
    vmms["loop"].step(f"loop v +3 {STORM}", patience=10 * PATIENCE)
    vmms["closed"].step("close-gmem v")
    vmms["closed"].step("loop v +9 4")
    vmms["bare"].step("unmap v +5")
    vmms["bare"].step("loop v +5 7")
    poisons.append(vmms["anon"].step("poison v +3"))
    assert vmms["anon"].step("touch v +3")["errno"] == "EINTR"
    return {poison["pfn"] for poison in poisons}


def meminfo(machine: Machine, field: str) -> int:
    text = machine.run("cat /proc/meminfo", check=True).stdout
    (value,) = re.findall(rf"^{field}:\s+(\d+)", text, re.MULTILINE)
    return int(value)


# -- the counts


def test_series_of_a_vm_are_there_at_0_before_its_first_event(story: Story) -> None:
    assert story.born == {(vm, *kind): 0 for vm in VMS for kind in BORN_AT_ZERO}


def test_the_story_has_something_of_everything(story: Story) -> None:
    """The VMMs report every kind of event; otherwise the tests below would compare zeros."""
    assert {key: count for key, count in story.exits.items() if count} == {
        ("web", "EHWPOISON", "hwpoison"): 1,
        ("loop", "EHWPOISON", "hwpoison"): STORM + AGAIN,
        ("closed", "EFAULT", "backing"): 4,
        ("bare", "EFAULT", "unannotated"): 7,
    }
    assert story.sigbus("anon", "AR") >= 1
    assert story.poisons.total() == 4


def test_prometheus_agrees_with_the_vmms(story: Story) -> None:
    shown = exits_in(story.prometheus.query("kvmtrace_memory_fault_exits_total"))
    assert shown == story.exits
    signals = story.prometheus.query("kvmtrace_sigbus_total")
    assert {(at["vm"], at["code"]): value for at, value in signals} == {
        (vm, code): story.sigbus(vm, code) for vm in VMS for code in CODES
    }
    poisons = story.prometheus.query("kvmtrace_poison_events_total > 0")
    assert {(at["page_type"], at["result"]): value for at, value in poisons} == story.poisons


def test_metrics_agree_with_the_vmms(story: Story) -> None:
    """The text of /metrics itself."""
    text = metrics_of(story.machine, story.serve)
    line = r'^kvmtrace_memory_fault_exits_total\{cause="(.*)",errno="(.*)",vm="(.*)"\} (.*)$'
    rows = re.findall(line, text, re.MULTILINE)
    assert {(vm, errno, cause): float(n) for cause, errno, vm, n in rows} == story.exits


def test_nothing_was_lost_and_every_scrape_answered(story: Story) -> None:
    assert story.prometheus.value("sum(kvmtrace_events_lost_total)") == 0
    assert story.prometheus.value("min(kvmtrace_scrape_collector_success)") == 1


# -- the panels

Shown = dict[tuple[str, ...], float]
Check = Callable[[Story, Shown], None]


def exactly(expected: Callable[[Story], Shown]) -> Check:
    """These label values (sorted) with these values."""

    def check(story: Story, shown: Shown) -> None:
        assert shown == {tuple(sorted(key)): value for key, value in expected(story).items()}

    return check


def roughly(expected: Callable[[Story], Shown]) -> Check:
    """Increases, which Prometheus extrapolates: 0 is exact, others are within a quarter."""

    def check(story: Story, shown: Shown) -> None:
        wanted = {tuple(sorted(key)): value for key, value in expected(story).items()}
        assert {k: v for k, v in shown.items() if v} == pytest.approx(
            {k: v for k, v in wanted.items() if v}, rel=0.25
        )
        assert wanted.keys() <= shown.keys()

    return check


def rates(positive: Callable[[Story], set[tuple[str, ...]]]) -> Check:
    """Exactly these are above 0."""

    def check(story: Story, shown: Shown) -> None:
        above = {tuple(sorted(key)) for key in positive(story)}
        assert {key for key, value in shown.items() if value > 0} == above

    return check


def between(low: float, high: float, *keys: tuple[str, ...]) -> Check:
    """The values of these keys (default: the only one) are within these limits."""

    def check(_: Story, shown: Shown) -> None:
        for key in keys or ((),):
            assert low < shown[key] < high, shown

    return check


def _latency(_: Story, shown: Shown) -> None:
    counts = [shown[(le,)] for le in "0.001 0.01 0.1 1.0 10.0 60.0 600.0 3600.0 +Inf".split()]
    assert counts == sorted(counts)
    # web's first page, loop's and anon's, all delivered within a minute
    assert counts[-1] == pytest.approx(3, rel=0.25)
    assert counts[5] == counts[-1]


def _attached(_: Story, shown: Shown) -> None:
    # Probes for context are shown where the kernel has them.
    assert set(shown.values()) == {1}
    assert shown.keys() >= {(spec.name,) for spec in probes.specs()}


def judged(word: str, *, by_vm: bool = False) -> Check:
    """As many verdicts of this word as `kvmtrace top` has, of all VMs or by VM."""

    def check(story: Story, shown: Shown) -> None:
        found = Counter(vm for vm, one in story.verdicts() if one == word)
        expected = {(vm,): found[vm] for vm in VMS} if by_vm else {(): found.total()}
        assert shown == expected

    return check


def _verdicts(story: Story, shown: Shown) -> None:
    found = Counter(word for _, word in story.verdicts())
    assert found.total() == 3  # loop's, web's and anon's
    assert shown == {(word,): found[word] for word in VerdictWord}


def _urgencies(story: Story, shown: Shown) -> None:
    assert shown.keys() == {(urgency,) for urgency in Urgency}
    assert shown[("looping",)] == 1
    # Those that earlier tests poisoned belong to no VM any more.
    assert sum(shown.values()) == story.poisons.total() + story.old
    assert shown[("kernel",)] == shown[("undelivered",)] == 0


def _poisons(story: Story, shown: Shown) -> None:
    # Of the last two minutes, which may be over on a slow machine.
    kinds = {tuple(sorted(kind)) for kind in story.poisons}
    assert {kind for kind, value in shown.items() if value > 0} <= kinds


CHECKS: dict[tuple[str, str], Check] = {
    ("variable job", "A"): exactly(lambda _: {(prometheus.JOB,): 1}),
    ("variable instance", "A"): exactly(lambda _: {(INSTANCE,): 1}),
    ("variable vm", "A"): exactly(lambda _: {(vm,): 1 for vm in VMS}),
    ("annotation Page poisoned", "A"): _poisons,
    ("VMMs looping", "A"): exactly(lambda _: {(): 1}),
    ("VMs stopped", "A"): judged("stopped"),
    ("Undelivered", "A"): exactly(lambda _: {(): 0}),
    ("Host at risk", "A"): exactly(lambda _: {(): 0}),
    ("Unclear", "A"): judged("unknown"),
    ("VMs", "looping"): exactly(lambda _: {(vm,): float(vm == "loop") for vm in VMS}),
    ("VMs", "stopped"): judged("stopped", by_vm=True),
    ("VMs", "undelivered"): exactly(lambda _: {(vm,): 0 for vm in VMS}),
    ("VMs", "unclear"): judged("unknown", by_vm=True),
    ("Poisoned pages in VMs", "A"): exactly(lambda _: {(): 4}),
    ("Poisoned pages of the kernel", "A"): exactly(lambda _: {(): 0}),
    ("Hardware corrupted", "A"): exactly(lambda s: {(): s.corrupted}),
    ("Poison to delivery, median", "A"): between(0, 60),
    ("Poison to delivery, 95 %", "A"): between(0, 60),
    ("Probes not attached", "A"): exactly(lambda _: {(): 0}),
    ("VMs", "pages"): exactly(
        lambda _: {("web",): 2, ("loop",): 1, ("anon",): 1, ("closed",): 0, ("bare",): 0}
    ),
    ("VMs", "poison"): exactly(lambda s: {(vm,): s.exits_by(vm, "hwpoison") for vm in VMS}),
    ("VMs", "conversion"): exactly(lambda _: {(vm,): 0 for vm in VMS}),
    ("VMs", "failed"): exactly(
        lambda s: {(vm,): s.exits_by(vm, "backing", "unannotated") for vm in VMS}
    ),
    ("VMs", "sigbus"): exactly(lambda s: {(vm,): s.sigbus(vm, "AR") for vm in VMS}),
    ("VMs", "info"): exactly(lambda s: {(vm, str(s.vmms[vm].pid), "vmm"): 1 for vm in VMS}),
    ("Memory-fault exits by errno and cause", "A"): rates(
        lambda _: {("EHWPOISON", "hwpoison"), ("EFAULT", "backing"), ("EFAULT", "unannotated")}
    ),
    ("Memory-fault exits by VM", "A"): rates(
        lambda _: {("web",), ("loop",), ("closed",), ("bare",)}
    ),
    ("Incidents by state", "A"): exactly(
        lambda s: {
            ("looping",): 1,
            ("delivered",): 2,
            ("latent",): 1,
            ("unowned",): s.old,
            ("closed",): 0,
        }
    ),
    ("Incidents by urgency", "A"): _urgencies,
    ("Incidents by verdict", "A"): _verdicts,
    ("Undelivered by VM", "A"): exactly(lambda _: {(vm,): 0 for vm in VMS}),
    ("Pages poisoned", "A"): roughly(lambda s: {kind: float(n) for kind, n in s.poisons.items()}),
    ("SIGBUS to VMMs", "A"): roughly(
        lambda s: {(vm, code): s.sigbus(vm, code) for vm in VMS for code in CODES}
    ),
    ("Poison to delivery", "A"): _latency,
    ("Probes attached", "A"): _attached,
    ("Lost", "A"): rates(lambda _: set()),
    ("Probe overhead", "A"): between(0, 1, ("run",), ("gmem",)),
    ("Probe time per run", "A"): between(0, 0.01, ("run",), ("gmem",)),
    ("kvmtrace's own CPU", "A"): between(0, 2),
    ("Not kept in the history", "A"): exactly(lambda _: {}),  # this serve has no history
    ("Size of the history", "A"): exactly(lambda _: {}),
    ("Source", "source"): exactly(lambda _: {("bpf", "bpf works here"): 1}),
}


def test_every_panel_has_a_check() -> None:
    assert {(query.panel, query.ref) for query in QUERIES} == CHECKS.keys()


# Compared with what other commands show at the time of the test; the others with the story.
JUDGED = {
    ("VMs stopped", "A"),
    ("Unclear", "A"),
    ("VMs", "stopped"),
    ("VMs", "unclear"),
    ("Incidents by verdict", "A"),
}


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.panel}-{query.ref}")
def test_every_panel_shows_what_happened(story: Story, query: dashboards.Query) -> None:
    key = query.panel, query.ref
    expr = query.filled(INSTANCE, WINDOW)
    deadline = time.monotonic() + PATIENCE
    while True:
        samples = story.prometheus.query(expr, None if key in JUDGED else story.at)
        shown = {tuple(sorted(labels.values())): value for labels, value in samples}
        try:
            CHECKS[key](story, shown)
            return
        except AssertionError:
            # A verdict may have changed between the two.
            if key not in JUDGED or time.monotonic() >= deadline:
                raise
        time.sleep(1)


# -- the alerts, and the end


# Verdicts are unknown at first.
TRANSIENT = {"KvmtraceUnclear"}


def test_alerts_fire_for_what_happened_only(story: Story) -> None:
    expected = {"KvmtraceFirstPoison", "KvmtraceLooping", "KvmtraceLatent", "KvmtraceStopped"}
    assert story.alerts_before == set()
    server = story.prometheus
    server.wait(lambda: server.notified() >= expected, PATIENCE)
    assert server.notified() <= expected | TRANSIENT


@pytest.mark.parametrize(
    ("alert", "vm", "text"),
    [
        ("KvmtraceLooping", "loop", "is stuck on poisoned memory: stop it and start it"),
        ("KvmtraceStopped", "anon", "has stopped at poisoned memory: stop it and start it"),
        (
            "KvmtraceLatent",
            "web",
            "has poisoned memory: shut it down from inside the guest and start it",
        ),
    ],
)
def test_a_notification_names_vm_host_and_what_to_do(
    story: Story, alert: str, vm: str, text: str
) -> None:
    server = story.prometheus
    server.wait(lambda: server.notified_of(alert, vm), PATIENCE)
    received = server.notified_of(alert, vm)
    assert received is not None
    assert received["annotations"]["summary"] == f"{vm} on hv-17 {text}"
    pid = story.vmms[vm].pid
    assert f'"kvmtrace explain {pid}"' in received["annotations"]["description"]
    for target in (str(pid), vm):
        answer = story.machine.run(f"kvmtrace explain {target}", check=True).stdout
        assert vm in answer
        assert re.search("stop|shut", answer, re.IGNORECASE)


def test_incidents_close_with_their_vms_and_the_counts_stay(story: Story) -> None:
    for vmm in story.vmms.values():
        if vmm.job.poll() is None:
            vmm.end()
    server = story.prometheus
    server.wait(lambda: server.value('kvmtrace_incidents{state="closed"}') == 4, PATIENCE)
    server.wait(lambda: "KvmtraceLooping" not in server.alerts(), PATIENCE)
    assert exits_in(server.query("kvmtrace_memory_fault_exits_total > 0")) == {
        key: count for key, count in story.exits.items() if count
    }


def test_alerts_are_resolved_once_the_vms_were_started_again(story: Story) -> None:
    server = story.prometheus
    anew = {name: Vmm(story.machine, name) for name in ("loop", "web", "anon")}
    try:
        for vmm in anew.values():
            vmm.step("create v backing=gmem pages=32")
            vmm.step("touch v +3")
        about = [
            ("KvmtraceLooping", "loop"),
            ("KvmtraceStopped", "anon"),
            ("KvmtraceLatent", "web"),
        ]
        server.wait(lambda: all(is_resolved(server.notified_of(*one)) for one in about), PATIENCE)
        server.wait_for_scrapes(3, PATIENCE)
        assert server.alerts() <= {"KvmtraceFirstPoison"}
    finally:
        for vmm in anew.values():
            vmm.job.kill()


def is_resolved(notification: prometheus.Notification | None) -> bool:
    return notification is not None and notification["status"] == "resolved"


def test_sigterm_ends_it_and_nothing_stays_attached(story: Story) -> None:
    assert len(story.attached["programs"]) > len(story.before["programs"])
    story.serve.signal(signal.SIGTERM)
    assert story.serve.wait(PATIENCE) == 0
    said = story.serve.stderr.splitlines()
    assert said[0] == f"serving http://{TARGET}/metrics"
    assert [line for line in said[1:] if not line.startswith("kvmtrace: incident ")] == []
    leftovers.assert_only(story.machine, story.before)
