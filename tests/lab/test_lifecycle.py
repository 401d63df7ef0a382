"""Start and end on a real kernel: kvm loaded late, signals, and errors at the start.

Hosts that refuse are in test_hosts.py. A start with eBPF compiles for many seconds under emulation,
so tests that need no BPF use the ftrace source.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable

import pytest

from tests.lab import leftovers, privileges
from tests.lab.conftest import Boot
from tests.lab.harness import (
    PATIENCE,
    Line,
    Vmm,
    Watch,
    assert_refused,
    exits_reported,
    exits_returned,
    kvmtrace,
)
from tests.lab.machine import Machine

pytestmark = pytest.mark.lab


# -- kvm is loaded after kvmtrace has started


def test_started_before_kvm_it_waits_and_attaches(boot: Boot) -> None:
    machine = boot(modules=("hwpoison-inject",))
    assert machine.run("test -e /sys/module/kvm").status == 1
    before = leftovers.attached(machine)
    watch = Watch(machine, "bpf")
    first = watch.job.stderr
    assert "not attached: " in first
    assert re.search(r"not attached:.*\brun\b", first), first
    attached = leftovers.attached(machine)
    assert len(attached["programs"]) > len(before["programs"])  # other probes are attached already
    privileges.assert_given_up(machine)

    machine.run("modprobe kvm-amd && test -c /dev/kvm", check=True)
    last = re.compile(r"kvm_destroy_vm\b")
    _wait_until(
        lambda: any(last.match(str(one)) for one in leftovers.attached(machine)["functions"]),
        "kvm's functions probed",
    )
    vmm = Vmm(machine, "early")
    vmm.step("create v backing=gmem pages=32")
    vmm.step("touch v +3")
    vmm.step("poison v +3")
    vmm.step("touch v +3")

    def exits(lines: list[Line]) -> list[Line]:
        return [x for x in lines if x["kind"] == "exit"]

    (reported,) = exits(watch.until(exits, "the exit"))
    assert (reported["errno"], reported["cause"]) == ("EHWPOISON", "hwpoison")
    assert reported["incident"]
    report = vmm.end()
    lines = watch.end()  # SIGINT
    assert exits_reported(lines, vmm.pid) == exits_returned(report)
    leftovers.assert_only(machine, before)

    # kvm can be unloaded only if no probe and no program holds it
    machine.run("modprobe -r kvm-amd kvm && ! test -e /sys/module/kvm", check=True)


def _wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.5)


# -- every kind of end


def test_no_signal_leaves_anything_attached(machine: Machine) -> None:
    """Two at once; SIGINT is in the test before this one, and `serve` in test_serve.py."""
    before = leftovers.attached(machine)
    terminal = {"TERM": "xterm-256color"}
    top = machine.start("exec kvmtrace top --source bpf", pty=(24, 80), env=terminal)
    killed = Watch(machine, "bpf")
    top.wait_for("Probes [1-9]", timeout=PATIENCE)  # all are attached by then
    assert len(leftovers.attached(machine)["links"]) > len(before["links"])
    # The end of one kvmtrace detaches nothing of the other.
    killed.job.signal(signal.SIGKILL)
    assert killed.job.wait(PATIENCE) == -signal.SIGKILL
    assert len(leftovers.attached(machine)["links"]) > len(before["links"])
    top.signal(signal.SIGTERM)
    assert top.wait(PATIENCE) == 0, top.tail()
    assert "Traceback" not in top.stdout
    leftovers.assert_only(machine, before)


def test_a_reader_that_leaves_is_no_error(machine: Machine) -> None:
    vmm = Vmm(machine, "read")
    vmm.step("create v backing=anon")
    result = machine.run(
        ["bash", "-c", "kvmtrace events --json --source ftrace | head -n 1; echo ${PIPESTATUS[*]}"],
        timeout=PATIENCE,
    )
    vmm.end()
    line, statuses = result.stdout.splitlines()
    assert "read" in line
    assert statuses == "0 0"
    assert [x for x in result.stderr.splitlines() if not x.startswith("kvmtrace: watching")] == []


# -- errors at the start

# With the programs of an earlier test in the cache, no bcc is needed.
NO_CACHE = {"KVMTRACE_CACHE_DIR": ""}


def test_with_bcc_out_of_sight(machine: Machine) -> None:
    # Without site, the distribution's packages are not importable, as in a venv.
    result = machine.run(
        "exec python3 -S -m kvmtrace events --source bpf",
        timeout=PATIENCE,
        env={"PYTHONPATH": "/opt/kvmtrace/lib", **NO_CACHE},
    )
    assert_refused(result, "out of this Python's sight", "--system-site-packages")


def test_with_the_bcc_of_pypi(machine: Machine) -> None:
    machine.run("mkdir -p /tmp/pypi/bcc && echo 'class Lattice: ...' > /tmp/pypi/bcc/__init__.py")
    pypi = {"PYTHONPATH": "/tmp/pypi", **NO_CACHE}
    result = kvmtrace(machine, "events --source bpf", pypi)
    assert_refused(result, "another project", "python3-bpfcc")
    doctor = kvmtrace(machine, "doctor --source bpf", pypi)
    assert doctor.status == 1
    assert "python3-bpfcc" in doctor.stdout
    assert doctor.stderr == ""


def test_port_in_use(machine: Machine) -> None:
    taken = machine.start(["python3", "-u", "-m", "http.server", "-b", "127.0.0.1", "9751"])
    try:
        taken.wait_for("Serving", timeout=PATIENCE)
        result = kvmtrace(machine, "serve --listen 127.0.0.1:9751 --source ftrace")
        assert_refused(result, "9751.*in use")
    finally:
        taken.kill()


def test_unknown_vm(machine: Machine) -> None:
    vmm = Vmm(machine, "known")
    vmm.step("create v backing=anon")
    result = kvmtrace(machine, "events --source ftrace --vm nosuch")
    vmm.end()
    assert result.status == 2
    assert result.stderr.splitlines() == [
        "kvmtrace: no VM 'nosuch' here",
        "hint: there are: known",
    ]
