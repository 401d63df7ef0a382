"""From `apt install ./kvmtrace_*.deb` on a host that systemd boots to a poison in its journal.

The tests are one story on one host, in order: its first boot, then a second one of the same disk.
KVMTRACE_SUITE=bookworm: on Debian 12, with its own kernel (default: trixie).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from kvmtrace.views.incident_log import INCIDENT_ID
from tests.lab.conftest import needed
from tests.lab.container import Container, manifest
from tests.lab.harness import PATIENCE, Vmm
from tests.lab.installed_host import MEMBER, InstalledHost
from tests.lab.service_host import RELEASES
from tests.unit.certificates import Certificates

pytestmark = pytest.mark.lab

RELEASE = RELEASES[os.environ.get("KVMTRACE_SUITE", "trixie")]
OPTIONS = "/etc/default/kvmtrace"


class Host(InstalledHost):
    """The host of these tests."""

    web: Vmm
    """A VM that has poison, from the first test on."""


def not_attached(text: str) -> tuple[str, ...]:
    """Probes that a status of serve names as missing."""
    found = re.search(r"not attached: (\w+(?:, \w+)*)", text)
    return tuple(found[1].split(", ")) if found else ()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with needed():
        found = Host(tmp_path_factory.mktemp("host"), RELEASE)
    yield found
    found.machine.close()


def test_from_apt_to_the_journal(host: Host) -> None:
    host.install()
    assert host.property("ActiveState") == "active"
    assert host.property("Type") == "notify"
    assert host.property("StatusText").startswith("watching by bpf")
    assert host.run("ls /var/cache/kvmtrace")  # compiled once
    host.run("systemd-analyze verify --man=no kvmtrace.service 2>&1")
    judged = host.run("systemd-analyze security --no-pager kvmtrace.service")
    exposure = re.search(r"Overall exposure level for kvmtrace.service: ([0-9.]+)", judged)
    assert exposure
    assert float(exposure[1]) <= 3.0

    # kvm comes, goes and comes again.
    host.run("! test -e /sys/module/kvm && modprobe kvm-amd")
    host.until(lambda: host.entries("PROBE=run"), "attached to kvm")
    host.until(lambda: host.machine.run("modprobe -r kvm-amd kvm").status == 0, "kvm unloaded")
    host.until(lambda: len(host.entries("PROBE=run")) == 2, "noticed")
    host.run("! test -e /sys/module/kvm && modprobe kvm-amd")
    host.until(lambda: len(host.entries("PROBE=run")) == 3, "attached to kvm anew")
    host.web = host.with_poison("web-1")
    host.until(
        lambda: not_attached(host.property("StatusText")) == RELEASE.missing_probes, "its probes"
    )
    entry = host.logged(host.web)
    assert entry["MESSAGE_ID"] == INCIDENT_ID
    assert entry["PRIORITY"] in "2456"
    assert {"URGENCY", "STATE", "VERDICT", "PFN", "ACTION", "INCIDENT"} <= set(entry)
    assert entry["MESSAGE"].startswith(f"incident {entry['INCIDENT']}: ")


def test_the_group_needs_no_root(host: Host) -> None:
    host.run(f"useradd --create-home --groups kvmtrace {MEMBER}")
    incident = host.logged(host.web)["INCIDENT"]
    assert "web-1" in host.by_member("top --once")
    assert "web-1" in host.by_member(f"explain {incident}")
    assert "web-1" in host.by_member("events --since 1h --count 1 --vm web-1")
    assert "web-1" in host.by_member("check", status=2)
    table = f"cd /home/{MEMBER} && exec runuser -u {MEMBER} -- kvmtrace top"
    on_terminal = host.machine.start(table, pty=(24, 100))
    if RELEASE.has_live_table:
        on_terminal.wait_for("web-1", PATIENCE)
        on_terminal.send("q")
        assert on_terminal.wait(PATIENCE) == 0
    else:
        assert on_terminal.wait(PATIENCE) == 1
        assert "the live table needs textual 1.0" in on_terminal.stdout
    host.by_member("bundle -o case.tar.gz")
    assert "web-1" in host.by_member("explain --from case.tar.gz")


def test_a_reader_that_hangs_is_replaced_meanwhile_a_container_watches(host: Host) -> None:
    """The container has what the DaemonSet asks for, and directories of its own."""
    pid = host.property("MainPID")
    host.run(f"kill -STOP {pid}")

    wanted = manifest()
    of_node = {path: f"/run/node{path}" for path in wanted.mounts if path.endswith("/kvmtrace")}
    container = Container(host.machine, wanted, of_node)
    container.job.wait_for("serving http", PATIENCE, "stderr")
    assert "not attached" not in container.job.stderr
    for path in ("healthy", "ready"):
        container.run(f"curl --silent --fail http://127.0.0.1:9750/-/{path}")
    vmm = host.with_poison("beside")
    container.job.wait_for(r"incident .*, beside \(pid", PATIENCE, "stderr")
    metrics = container.run("curl --silent --fail http://127.0.0.1:9750/metrics")
    assert re.search(r'kvmtrace_memory_fault_exits_total{.*vm="beside"', metrics)
    shown = host.run("KVMTRACE_RUNTIME_DIR=/run/node/run/kvmtrace kvmtrace top --once")
    assert "beside" in shown
    vmm.end()
    container.end()

    host.until_restarted(1)
    assert host.property("MainPID") != pid
    assert "atchdog" in host.run("journalctl --no-pager UNIT=kvmtrace.service")


def test_what_was_seen_is_there_after_kill_and_restart(host: Host) -> None:
    incident = host.logged(host.web)["INCIDENT"]
    host.run(f"kill -KILL {host.property('MainPID')}")
    host.until_restarted(2)
    assert "web-1" in host.by_member(f"explain {incident}")


def test_a_member_starts_it_by_its_socket(host: Host) -> None:
    """kvmtrace.socket: who listens is process 1, who answers is the service."""
    incident = host.logged(host.web)["INCIDENT"]
    host.run("systemctl stop kvmtrace && systemctl enable --now kvmtrace.socket 2>&1")
    assert host.property("ActiveState") == "inactive"
    shown = host.by_member(f"explain {incident}")
    assert host.property("ActiveState") == "active"
    assert "web-1" in shown
    assert f"(bpf, serve, pid {host.property('MainPID')})" in shown
    socket = "/run/kvmtrace/kvmtrace.sock"
    asked = f"curl --silent --fail --unix-socket {socket} http://localhost/explain?target=web-1"
    assert "web-1" in host.run(f"runuser -u {MEMBER} -- {asked}")
    assert host.run(f"stat -c '%U:%G %a' {socket}").strip() == "root:kvmtrace 660"

    # A client waits for one that is being started.
    before = host.property("MainPID")
    host.run("systemctl restart --no-block kvmtrace")
    host.until(lambda: host.property("MainPID") not in (before, "0"), "another process")
    shown = host.by_member("top --once")
    assert "web-1" in shown
    assert f"(of kvmtrace serve, pid {host.property('MainPID')})" in shown
    # From its next start on it makes its own.
    host.run("systemctl disable --now kvmtrace.socket 2>&1")


PROMETHEUS = """
global: {scrape_interval: 1s}
scrape_configs:
  - job_name: kvmtrace
    scheme: https
    tls_config: {ca_file: /etc/kvmtrace/ca.pem}
    basic_auth: {username: prometheus, password: the right one}
    static_configs: [{targets: ["127.0.0.1:9750"]}]
"""
WEB_CONFIG = """
tls_server_config: {cert_file: server.pem, key_file: server.key}
basic_auth_users:
  prometheus: $2y$04$3hb1A1k1R1tivsAucEk9Z.CYQBPd4IWASKnGL6SiHnhIEoEYzZqce
"""


def test_scraped_over_tls_with_a_password_while_ftrace_watches(host: Host) -> None:
    """The other source, under the same unit."""
    Certificates(host.machine.share)
    host.run("mkdir -p /etc/kvmtrace && cp /mnt/share/*.pem /mnt/share/*.key /etc/kvmtrace")
    host.machine.run("cat >/etc/kvmtrace/web.yml", stdin=WEB_CONFIG, check=True)
    host.machine.run("cat >/tmp/prometheus.yml", stdin=PROMETHEUS, check=True)
    options = "--source ftrace --web.config.file /etc/kvmtrace/web.yml"
    host.run(f"echo KVMTRACE_OPTIONS={options} >{OPTIONS} && systemctl restart kvmtrace")
    assert host.property("StatusText").startswith("watching by ftrace")
    assert "web-1" in host.by_member("top --once")
    host.logged(host.with_poison("web-2"))
    server = host.machine.start(
        "exec prometheus --config.file=/tmp/prometheus.yml --storage.tsdb.path=/tmp/prometheus"
        " --web.listen-address=127.0.0.1:9090"
    )

    def incidents() -> list[Any]:
        ask = "http://127.0.0.1:9090/api/v1/query?query=kvmtrace_incidents>0"
        done = host.machine.run(["curl", "--silent", "--fail", ask], PATIENCE)
        return list(json.loads(done.stdout or "{}").get("data", {}).get("result", []))

    host.until(incidents, "incidents in Prometheus")
    server.kill()
    plain = "curl --silent --insecure --output /dev/null --write-out %{http_code}"
    assert host.run(f"{plain} https://127.0.0.1:9750/metrics") == "401"


SUSPENDED = 6.0  # seconds
RTC_SECONDS = 2.0
"""How much less the host may measure: its RTC has whole seconds."""


def test_after_a_suspension_times_are_right(host: Host) -> None:
    """The host sleeps under the service, which goes on as the same process."""
    service, restarts = host.property("MainPID"), host.property("NRestarts")
    before = host.with_poison("before")
    host.logged(before)
    host.machine.suspend(SUSPENDED)
    began = host.wall_time()
    after = host.with_poison("after")
    host.logged(after)
    ended = host.wall_time()
    assert (host.property("MainPID"), host.property("NRestarts")) == (service, restarts)

    shown = json.loads(host.run("kvmtrace top --once --json"))
    (step,) = shown["clock_steps"]
    asleep = SUSPENDED - RTC_SECONDS
    assert step["suspended_ns"] >= asleep * 1e9
    notified = {owner["vm"]["pid"]: one for one in shown["incidents"] for owner in one["owners"]}
    # An exit, or a signal where the memory is no guest_memfd.
    events = host.run("kvmtrace events --json --since 1h --until now").splitlines()
    kept = [x for x in map(json.loads, events) if x["kind"] in ("exit", "sigbus") and "vm" in x]
    for vmm, first, last in ((before, 0.0, began - asleep), (after, began, ended)):
        assert first < moment(notified[vmm.pid]["first_delivery_ts"]) < last
        times = [moment(x["ts"]) for x in kept if x["vm"]["pid"] == vmm.pid]
        assert times
        assert all(first < ts < last for ts in times)


def moment(ts: str) -> float:
    """Seconds since the epoch."""
    return datetime.fromisoformat(ts).timestamp()


def test_after_a_reboot_it_is_history(host: Host) -> None:
    host.run(f"rm -f {OPTIONS}")
    host.reboot()
    host.until(lambda: host.property("ActiveState") == "active", "active after the boot")
    shown = json.loads(host.run("kvmtrace top --once --json"))
    assert {one["urgency"] for one in shown["incidents"]} == {"closed"}
    # A VM's end may be seen while the host shuts down: then that is what ended its incidents.
    for one in shown["incidents"]:
        assert "rebooted_ts" in one or all(owner.get("gone") for owner in one["owners"])
    assert re.search("rebooted since|is gone", host.run("kvmtrace explain web-1"))
    host.run("kvmtrace record --since 1h -o /tmp/before.jsonl")
    assert "web-1" in host.run("kvmtrace replay /tmp/before.jsonl")
