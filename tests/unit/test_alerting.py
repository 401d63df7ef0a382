"""What an alert reads when it reaches a person: through Prometheus and Alertmanager to a webhook.

The kernel is played by the test. What comes after the source is real: session, correlator,
exporter, the rules of dashboards/alerts.yml, and `kvmtrace explain`, which asks the session as it
asks a serve.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmtrace import kvm, sources
from kvmtrace.events import (
    Event,
    Exit,
    GmemPage,
    GmemRefusal,
    Owner,
    Poison,
    Tick,
    VcpuState,
    VmGone,
    VmSeen,
)
from kvmtrace.judgement.action import ActionKind
from kvmtrace.judgement.actions import actions
from kvmtrace.judgement.urgency import by_urgency
from kvmtrace.model import Incident
from kvmtrace.session.session import Session
from tests import dashboards, docs
from tests.prometheus import (
    INHIBITION,
    Alertmanager,
    Notification,
    Prometheus,
    Webhook,
    missing,
    required,
)
from tests.unit import serving
from tests.unit.command_line import invoke
from tests.unit.fake import SECOND, T0, FakeSource
from tests.unit.serving import open_door

_TOOLS = ("prometheus", "prometheus-alertmanager")

pytestmark = pytest.mark.skipif(
    missing(*_TOOLS) is not None and not required(), reason=str(missing(*_TOOLS))
)

PATIENCE = 120
HOST = "hv-17"
PAGE = "dirty unevictable LRU page"

# {VM key: (name, pid)}
VMS = {
    1: ("web-prod-01", 21000),
    2: ("pg-primary", 22000),
    3: ("conf-vm-snp-01", 23000),
    4: ("redis; reboot", 24000),  # names are what tenants chose
    5: ("k8s-node-17", 25000),
    6: ("idle", 26000),
}
UUID = "5b2f0000-1c2d-4e5f-8a9b-0123456789a"


class Kernel(FakeSource):
    """A source of the events that the test provides."""

    def happen(self, *events: Event) -> None:
        """Let the session read these together."""
        self._batches.append([*events])


def seen(ts: int, key: int, pid: int | None = None) -> VmSeen:
    name, first_pid = VMS[key % 10]
    return VmSeen(ts, key, pid or first_pid, name, f"{UUID}{key % 10}", "qemu")


def guest_page(ts: int, pfn: int, vm: int) -> Poison:
    """A page of a VM's guest_memfd is declared poisoned."""
    owned = GmemPage(vm, pfn, (Owner(vm, 0x100 + vm),))
    return Poison(ts, pfn, PAGE, "Failed", tid=900 + vm, gmem=owned)


def notified(ts: int, vm: int, count: int = 1) -> Exit:
    """KVM_RUN reports the page of ``guest_page`` to the VMM."""
    gfn, reason = 0x100 + vm, kvm.EXIT_MEMORY_FAULT
    return Exit(
        ts,
        vm,
        0,
        kvm.EHWPOISON,
        reason,
        True,
        500 + vm,
        flags=0,
        gpa=gfn << 12,
        size=4096,
        gfn=gfn,
        gmem=kvm.EHWPOISON,
        count=count,
    )


def misfortune(ts: int) -> list[Event]:
    """One of each kind; nothing happens to VM 6.

    VM 1 has a second page, which its guest has not touched: of that nobody is notified.
    """
    stopped = [VcpuState(ts + n * SECOND, 2, 502, "outside", 0, ran_ns=0) for n in (2, 4)]
    unclear = VcpuState(ts + 5 * SECOND, 5, 505, "outside", 0)
    return [
        *(guest_page(ts, 0xABC000 + vm, vm) for vm in (1, 2, 3, 4, 5)),
        Poison(ts, 0xABC011, PAGE, "Failed", tid=911, gmem=GmemPage(1, 17, (Owner(1, 0x111),))),
        Poison(ts, 0x40272D, "reserved kernel page", "Ignored", tid=990),
        Poison(ts, 0x1002, "free buddy page", "Recovered", tid=991),
        GmemRefusal(ts, 3, 0x103, 3),
        notified(ts, 2),
        notified(ts, 5),
        *stopped,
        unclear,
        Tick(ts + 20 * SECOND),
        notified(ts + 21 * SECOND, 1, 5000),
    ]


@dataclass
class Site:
    """A host with kvmtrace on it, and those who are notified."""

    kernel: Kernel
    session: Session
    prometheus: Prometheus
    webhook: Webhook

    def firing(self) -> dict[tuple[str, str], Notification]:
        """{(alert, VM or ""): the last that was received of it}, if that is firing.

        A VM that was started anew is "NAME anew": a name is not a VM.
        """
        return {key: one for key, one in self._last().items() if one["status"] == "firing"}

    def resolved(self) -> set[tuple[str, str]]:
        return {key for key, one in self._last().items() if one["status"] == "resolved"}

    def _last(self) -> dict[tuple[str, str], Notification]:
        last = {}
        for one in self.webhook.notifications():
            labels = one["labels"]
            name = labels.get("name", "")
            if labels.get("pid") != pid_of(name):
                name += " anew"
            last[labels["alertname"], name] = one
        return last


def pid_of(name: str) -> str | None:
    return next((str(pid) for known, pid in VMS.values() if known == name), None)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    rules = tmp_path / "alerts.yml"
    rules.write_text(dashboards.quick_alerts())
    kernel = Kernel()
    session = Session(kernel)
    server = serving.serve("127.0.0.1:0", session)
    instance = f"{HOST}:{server.address[1]}"
    target = f"127.0.0.1:{server.address[1]}"
    try:
        session.start()
        with (
            open_door(session),
            Webhook() as webhook,
            Alertmanager(webhook.url) as alertmanager,
            Prometheus(
                target, rules, instance=instance, alertmanager=alertmanager.address
            ) as prometheus,
        ):
            yield Site(kernel, session, prometheus, webhook)
    finally:
        server.close()
        session.close()


# What an SMS reads, by alert and VM.
SMS = {
    ("KvmtraceLooping", "web-prod-01"): (
        "web-prod-01 on hv-17 is stuck on poisoned memory: stop it and start it"
    ),
    ("KvmtraceStopped", "pg-primary"): (
        "pg-primary on hv-17 has stopped at poisoned memory: stop it and start it"
    ),
    ("KvmtraceUndelivered", "conf-vm-snp-01"): (
        "conf-vm-snp-01 on hv-17 was not notified of poisoned memory: "
        "shut it down from inside the guest and start it"
    ),
    ("KvmtraceLatent", "redis; reboot"): (
        "redis; reboot on hv-17 has poisoned memory: "
        "shut it down from inside the guest and start it"
    ),
    ("KvmtraceUnclear", "k8s-node-17"): (
        "k8s-node-17 on hv-17 was notified of poisoned memory, and what it did is not known: "
        "see whether it works"
    ),
    ("KvmtraceKernelPage", ""): (
        "The kernel of hv-17 uses poisoned memory: move its VMs away (not those with poisoned "
        "pages: shut these down) and reboot it"
    ),
    ("KvmtraceFirstPoison", ""): "Memory of hv-17 was poisoned: look for a failing DIMM",
}
# What kvmtrace advises first in these cases: the alerts read the same.
ADVISED = {
    ("KvmtraceLooping", "web-prod-01"): ActionKind.STOP_AND_START,
    ("KvmtraceStopped", "pg-primary"): ActionKind.STOP_AND_START,
    ("KvmtraceUndelivered", "conf-vm-snp-01"): ActionKind.SHUT_DOWN,
    ("KvmtraceLatent", "redis; reboot"): ActionKind.SHUT_DOWN,
    ("KvmtraceUnclear", "k8s-node-17"): ActionKind.CHECK,
    ("KvmtraceKernelPage", ""): ActionKind.MOVE_AWAY,
}
OF_VMS = [key for key in SMS if key[1]]
# FakeSource has a probe that is not attached.
ALWAYS = {("KvmtraceProbeMissing", "")}


def test_who_is_notified_of_what_until_it_is_over(site: Site) -> None:
    exits = "kvmtrace_memory_fault_exits_total"
    site.kernel.happen(*(seen(T0, key) for key in VMS))
    site.prometheus.wait(
        lambda: len(site.prometheus.query(f"count by (vm) ({exits})")) == len(VMS), PATIENCE
    )
    site.prometheus.wait_for_scrapes(2, PATIENCE)
    assert site.firing().keys() <= ALWAYS

    site.kernel.happen(*misfortune(T0 + SECOND))
    site.prometheus.wait(lambda: site.firing().keys() == SMS.keys() | ALWAYS, PATIENCE)
    firing = site.firing()
    assert {key: firing[key]["annotations"]["summary"] for key in SMS} == SMS
    for alert, name in OF_VMS:
        _what_it_names_is_answered(firing[alert, name], name)
    snapshot = site.session.snapshot()
    for (alert, name), kind in ADVISED.items():
        incident = by_urgency(one for one in snapshot.incidents if _is_of(one, name))[0]
        first = actions(incident, snapshot)[0]
        assert (first.kind, first.vm.name if first.vm else "") == (kind, name), alert

    # The VMs are stopped and started; those that hold no page are left alone.
    now = T0 + 60 * SECOND
    for key in (1, 2, 3, 4, 5):
        anew = seen(now + SECOND, 10 + key, 31000 + key)
        site.kernel.happen(VmGone(now, key), anew)
    site.prometheus.wait(lambda: site.resolved() >= set(OF_VMS), PATIENCE)
    infos = f'kvmtrace_vm_info{{pid=~"3100.", name=~"{"|".join(name for _, name in OF_VMS)}"}}'
    site.prometheus.wait(lambda: len(site.prometheus.query(infos)) == len(OF_VMS), PATIENCE)
    site.prometheus.wait_for_scrapes(3, PATIENCE)
    # The kernel's page is still there, and nobody is notified of a VM that was started anew.
    left = {("KvmtraceKernelPage", ""), ("KvmtraceFirstPoison", "")}
    assert site.firing().keys() == left | ALWAYS


def _is_of(incident: Incident, name: str) -> bool:
    """Whether it is the incident of the VM with this name; the kernel's if there is no name."""
    names = {identity.name for identity in incident.vm_identities.values()}
    return name in names if name else incident.host_at_risk


def _what_it_names_is_answered(alert: Notification, name: str) -> None:
    """The command in the text, and the VM's name, both give the incident and what to do."""
    text = alert["annotations"]["description"]
    assert "do not migrate" in text
    (pid,) = re.findall(r'"kvmtrace explain ([^"]+)"', text)
    assert pid == pid_of(name)
    assert f"#{alert['labels']['alertname'].lower()}" in alert["annotations"]["runbook_url"]
    for target in (pid, name):
        answer = invoke("explain", target)
        assert answer.exit_code == 0, answer.stderr
        assert name in answer.stdout
        assert re.search("stop|shut", answer.stdout, re.IGNORECASE)
        if "stop it and start it" in alert["annotations"]["summary"]:
            commands = f"virsh destroy {name} && virsh start {name}"
            assert commands in " ".join(answer.stdout.split())


@pytest.fixture(autouse=True)
def _attach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """``explain`` asks the session: an attempt to attach is a failure of the test."""
    monkeypatch.setattr(sources, "open_source", lambda kind: pytest.fail("attached"))


def test_the_inhibition_is_in_the_docs() -> None:
    """The Alertmanager of these tests has it."""
    assert INHIBITION in (docs.ROOT / "docs/metrics.md").read_text(encoding="utf-8")


# -- the texts


def summaries() -> dict[str, str]:
    """{alert: its summary, as a template on one line}."""
    text = dashboards.ALERTS.read_text(encoding="utf-8")
    found = re.findall(
        r"- alert: (\w+)$.*?summary: >-\n(.*?)^ +description", text, re.MULTILINE | re.DOTALL
    )
    return {name: " ".join(summary.split()) for name, summary in found}


def test_every_summary_fits_into_an_sms() -> None:
    assert len(summaries()) == dashboards.ALERTS.read_text(encoding="utf-8").count("- alert: ")
    for name, template in summaries().items():
        with_name = re.sub(r"\{\{ if \$labels.pid \}\}.*\{\{ end \}\}", "v" * 40, template)
        text = re.sub(r"\{\{.*?\}\}", "h" * 30, with_name)
        assert len(text) <= 160, name


def test_every_alert_has_links() -> None:
    board = dashboards.load()["uid"]
    rules = Path(dashboards.ALERTS).read_text(encoding="utf-8").split("- alert: ")[1:]
    for rule in rules:
        name = rule.splitlines()[0]
        assert f"runbook_url: https://docs.example.com/kvmtrace/runbook.md#{name.lower()}\n" in rule
        assert "dashboard_url: " in rule
        severities = re.findall(r"severity: (\w+)", rule)
        assert len(severities) == 1
        assert set(severities) <= {"critical", "warning", "info"}
    text = dashboards.ALERTS.read_text(encoding="utf-8")
    assert set(re.findall(r"grafana.example.com/d/([\w-]+)", text)) == {board}
