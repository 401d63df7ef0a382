"""Tests of the ftrace source only, above all of its traces in tracefs.

The scenarios run with both sources in test_sources.py.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable

import pytest

from tests.lab.harness import PATIENCE, Vmm, Watch, exits_reported, exits_returned, watching
from tests.lab.machine import Machine
from tests.lab.scenarios import vms_gone

pytestmark = pytest.mark.lab

TRACEFS = "/sys/kernel/tracing"


def traces(machine: Machine) -> tuple[set[str], set[str]]:
    """The existing (instances, groups of dynamic events)."""
    instances = machine.run(["ls", f"{TRACEFS}/instances"], check=True).stdout.split()
    events = machine.run(["cat", f"{TRACEFS}/dynamic_events"], check=True).stdout.splitlines()
    return set(instances), {line.split(":")[1].split("/")[0] for line in events}


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def assert_efault_reported(machine: Machine, watch: Watch) -> None:
    """Cause an unannotated EFAULT and check that it is reported."""
    vmm = Vmm(machine, "probe")
    vmm.step("create v backing=anon")
    vmm.step("unmap v +5")
    vmm.step("touch v +5")
    report = vmm.end()
    lines = watch.until(
        lambda ls: [x for x in ls if x["kind"] == "exit" and x["vm"]["pid"] == vmm.pid],
        "the exit",
    )
    assert exits_reported(lines, vmm.pid) == exits_returned(report)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(machine: Machine, number: signal.Signals) -> None:
    before = traces(machine)
    watch = Watch(machine, "ftrace")
    assert traces(machine) != before
    watch.job.signal(number)
    watch.job.wait(PATIENCE)
    assert "Traceback" not in watch.job.stderr
    assert traces(machine) == before


def test_the_next_start_removes_what_a_killed_one_left_and_only_that(machine: Machine) -> None:
    before = traces(machine)
    own = "f:mine/gone kvm_destroy_vm"
    machine.run(f"mkdir {TRACEFS}/instances/mine && echo '{own}' >> {TRACEFS}/dynamic_events")
    try:
        killed = Watch(machine, "ftrace")
        left_by_killed = traces(machine)
        with watching(machine, "ftrace") as living:
            both = traces(machine)
            killed.job.signal(signal.SIGKILL)
            killed.job.wait(PATIENCE)
            assert traces(machine) == both
            with watching(machine, "ftrace"):
                now = traces(machine)
                for left, still in zip(left_by_killed, now, strict=True):
                    assert {name for name in left & still if "kvmtrace" in name} == set()
                assert "mine" in now[0]
                assert "mine" in now[1]
            assert_efault_reported(machine, living)
    finally:
        machine.run(f"rmdir {TRACEFS}/instances/mine; echo -:mine/gone >> {TRACEFS}/dynamic_events")
    assert traces(machine) == before


def test_two_at_once_see_the_same(machine: Machine) -> None:
    with watching(machine, "ftrace") as one, watching(machine, "ftrace") as other:
        assert_efault_reported(machine, one)
        wait_for(lambda: other.lines("exit"), "the exit at the other")
        found = [
            [{k: v for k, v in x.items() if k != "ts"} for x in watch.lines("exit")]
            for watch in (one, other)
        ]
        assert found[0] == found[1]


def test_everybody_elses_error_log_is_left_alone(machine: Machine) -> None:
    machine.run(f"echo 'f:mine/no no_such_function' >> {TRACEFS}/dynamic_events")
    with watching(machine, "ftrace"):
        pass
    log = machine.run(["cat", f"{TRACEFS}/error_log"], check=True).stdout
    assert log


def test_more_places_than_the_kernel_has_entries_for(machine: Machine) -> None:
    """The kernel counts 4096 addresses separately; exits beyond lose their address, nothing else.

    Hosts of confidential VMs have that many: each conversion is an exit.
    """
    pages, each = 5000, 3
    steps = [f"create v backing=gmem pages={pages}", "close-gmem v"]
    steps += [f"loop v +{page} {each}" for page in range(pages)]
    (machine.share / "steps").write_text("\n".join(steps) + "\n")
    with watching(machine, "ftrace") as watch:
        job = machine.start("exec vmm --name many --steps /mnt/share/steps")
        assert job.wait(5 * PATIENCE) == 0
        report = json.loads(job.stdout.splitlines()[-1])
        lines = watch.until(vms_gone(report["pid"]), "the VM's end")
    returned, reported = exits_returned(report), exits_reported(lines, report["pid"])
    assert len(returned) == pages
    assert reported.total() == returned.total() == pages * each
    nameless = reported - returned
    assert {key[2:6] for key in nameless} == {("EFAULT", 39, True, None)}
    assert [line for line in lines if line["kind"] == "lost"] == []


def test_the_kernel_takes_all_that_can_be_muted(machine: Machine) -> None:
    """The longest filter that muting can build is accepted; a longer one changes nothing."""
    code = """
from kvmtrace.sources.ftrace.totals import ExitKey, SignalKey
from kvmtrace.sources.ftrace.muting import ExitMuting, SignalMuting, exclusions
from kvmtrace.sources.ftrace.source import FtraceSource
from kvmtrace.sources.limits import MAX_MUTED, MUTE_AFTER

exits, signals, top = ExitMuting(), SignalMuting(), (1 << 64) - 1
for n in range(MAX_MUTED):
    fault = ExitKey(top - n, -4095, 39, top - (n << 12), top)
    signal = SignalKey("sigbus", (1 << 22) - n, 4, top - n)
    for _ in range(MUTE_AFTER):
        exits.event(fault, top)
        signals.event(signal, top)
    signals.fault(signal, top - n, top >> 12)
    signals.returned(signal, top - n)
muted = exclusions(exits.conditions(), signals.conditions())
source = FtraceSource()
attacher = source._attacher
try:
    def filters():
        paths = attacher._filters.items()
        return {name: attacher._ring_of(name).read(path) for name, (path, _) in paths}
    before = filters()
    print(attacher.mute(muted))
    print(all(text in filters()[name] for name, text in muted.items()))
    print(attacher.mute(muted | {"faultin": 3 * muted["faultin"]}))
    print(filters() == before)
finally:
    source.close()
"""
    output = machine.run(["python3", "-c", code], timeout=PATIENCE, check=True).stdout
    assert output.split() == ["True", "True", "False", "True"]


def test_types_are_read_as_libbpf_reads_them(machine: Machine) -> None:
    code = """
import ctypes
from kvmtrace.linux.btf import Btf

lib, ours = ctypes.CDLL("libbpf.so.1"), Btf()
lib.btf__load_vmlinux_btf.restype = lib.btf__load_module_btf.restype = ctypes.c_void_p
lib.btf__type_by_id.restype = ctypes.POINTER(ctypes.c_uint32)
vmlinux = ctypes.c_void_p(lib.btf__load_vmlinux_btf())
kvm = ctypes.c_void_p(lib.btf__load_module_btf(b"kvm", vmlinux) or vmlinux.value)
for name in ("task_struct", "kvm_vcpu", "kvm_run", "kvm_memory_slot", "no_such_struct"):
    found = lib.btf__find_by_name_kind(kvm, name.encode(), 4)
    size = lib.btf__type_by_id(kvm, found)[2] if found > 0 else None
    print(name, size, ours.size(name))
print("pid", ours.offset("task_struct", "pid") + 4, ours.offset("task_struct", "tgid"))
"""
    lines = machine.run(["python3", "-c", code], timeout=PATIENCE, check=True).stdout.splitlines()
    found = {name: (theirs, ours) for name, theirs, ours in map(str.split, lines)}
    assert len(found) == 6
    assert all(theirs == ours for theirs, ours in found.values()), found
    assert found["no_such_struct"] == ("None", "None")
    assert "None" not in found["kvm_vcpu"]
