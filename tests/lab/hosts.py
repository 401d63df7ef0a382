"""Scenarios about the host: what it lacks or refuses, and what changes while kvmtrace runs.

As in scenarios.py, tests and the matrix run the same functions. They raise AssertionError if
kvmtrace is wrong, Unstageable if the kernel cannot be put into that state.
"""

from __future__ import annotations

import json
import re
import time

from tests.lab import leftovers, privileges
from tests.lab.harness import (
    PATIENCE,
    Line,
    Unstageable,
    Vmm,
    Watch,
    assert_refused,
    end_following,
    exits_reported,
    exits_returned,
    kvmtrace,
    watching,
)
from tests.lab.machine import Machine
from tests.lab.scenarios import Scenario, storm, vms_gone

# Where a kernel is linked to run (x86: PHYSICAL_START of arch/x86/Kconfig; arm64: KIMAGE_VADDR of
# arch/arm64/include/asm/memory.h with addresses of 48 or 47 bits): KASLR moves it from there.
LINKED_AT = {
    "x86_64": (0xFFFFFFFF81000000,),
    "aarch64": (0xFFFF800080000000, 0xFFFFC00080000000),
}

HIDE_KVM_BTF = "mount --bind /dev/null /sys/kernel/btf/kvm"
NO_TRACEFS = "umount -R /sys/kernel/tracing /sys/kernel/debug"  # debugfs contains tracefs
NOBODY = "setpriv --reuid=65534 --regid=65534 --clear-groups"


def reports_sigbus_and_exit(machine: Machine, watch: Watch, *, exits: bool | None = None) -> None:
    """Notify a VMM by a SIGBUS and by an exit, and check that kvmtrace reports both.

    Any kernel can stage this. ``exits``: whether this source sees exits here.
    """
    if exits is None:
        exits = "run" not in watch.not_attached()
    vmm = Vmm(machine, "bothways")
    vmm.step("create v backing=anon")
    vmm.step("touch v +3")
    poison = vmm.step("poison v +3")
    watch.until(
        lambda ls: [x for x in ls if x["kind"] == "poison" and x["pfn"] == poison["pfn"]],
        "the poison",
    )
    touch = vmm.step("touch v +3")
    # kvmtrace looks up the owner, which needs the VMM to be running.
    watch.until(
        lambda ls: [x for x in ls if x["kind"] == "sigbus" and x["tid"] == touch["tid"]],
        "the SIGBUS",
    )
    vmm.step("unmap v +5")
    vmm.step("touch v +5")
    report = vmm.end()
    lines = watch.until(vms_gone(vmm.pid), "the VM's end")
    (reported,) = [x for x in lines if x["kind"] == "poison" and x["pfn"] == poison["pfn"]]
    (signal,) = [x for x in lines if x["kind"] == "sigbus" and x["tid"] == touch["tid"]]
    assert signal["vm"]["name"] == "bothways"
    assert (signal["code"], signal["hva"]) == ("AR", touch["sigbus"][0]["hva"])
    assert signal["incident"] == reported["incident"]
    assert exits_reported(lines, vmm.pid) == (exits_returned(report) if exits else {})
    assert [line for line in lines if line["kind"] == "lost"] == []


def _text_address(machine: Machine) -> int:
    symbols = machine.run(["grep", " _text$", "/proc/kallsyms"], check=True).stdout
    return int(symbols.split()[0], 16)


def _linked_at(machine: Machine) -> tuple[int, ...]:
    arch = machine.run(["uname", "-m"], check=True).stdout.strip()
    if arch not in LINKED_AT:
        raise Unstageable(f"where a kernel of {arch} is linked to run is not known here")
    return LINKED_AT[arch]


def kaslr(machine: Machine, source: str) -> None:
    """KASLR is on, as it is by default."""
    if _text_address(machine) in _linked_at(machine):
        raise Unstageable("this kernel was not moved by KASLR")
    with watching(machine, source) as watch:
        reports_sigbus_and_exit(machine, watch)


def nokaslr(machine: Machine, source: str) -> None:
    """KASLR is off: the kernel runs at the address that it was linked for."""
    assert _text_address(machine) in _linked_at(machine), hex(_text_address(machine))
    with watching(machine, source) as watch:
        reports_sigbus_and_exit(machine, watch)


def no_kvm_types(machine: Machine, source: str) -> None:
    """kvm's BTF is missing (vmlinux's is there): probes that do not need it still attach."""
    if machine.run("test -s /sys/kernel/btf/kvm").status:
        raise Unstageable("kvm has no BTF of its own here: it is built in, or a module without")
    with watching(machine, source, mount_change=HIDE_KVM_BTF) as watch:
        reports_sigbus_and_exit(machine, watch)


def no_tracefs(machine: Machine, source: str) -> None:
    """tracefs is not mounted: the ftrace source prints how to mount it, bpf does not need it."""
    if source == "bpf":
        with watching(machine, source, mount_change=NO_TRACEFS) as watch:
            reports_sigbus_and_exit(machine, watch)
    else:
        result = kvmtrace(machine, "events --source ftrace", mount_change=NO_TRACEFS)
        assert_refused(result, "tracefs", "mount -t tracefs")
    judged = kvmtrace(machine, f"doctor --source {source}", mount_change=NO_TRACEFS)
    assert re.search(r"✗ NO +tracefs", judged.stdout), judged.stdout
    assert "mount -t tracefs" in judged.stdout
    assert judged.stderr == "", judged.stderr
    if source == "ftrace":
        assert judged.status == 1


def unprivileged(machine: Machine, source: str) -> None:
    """Run without any capability: commands fail with one line, and doctor works."""
    for command in ("events", "top --once", "serve"):
        result = machine.run(f"{NOBODY} kvmtrace {command} --source {source}", timeout=PATIENCE)
        assert_refused(result, "needs root", "sudo")
    judged = machine.run(f"{NOBODY} kvmtrace doctor --source {source}", timeout=PATIENCE)
    assert judged.status == 1
    assert re.search(r"✗ NO +privilege", judged.stdout), judged
    assert judged.stderr == "", judged.stderr


def lockdown(machine: Machine, source: str) -> None:
    """lockdown=confidentiality: the kernel refuses all tracing, and the error names lockdown."""
    state = machine.run(["cat", "/sys/kernel/security/lockdown"]).stdout
    if "[confidentiality]" not in state:
        raise Unstageable(f"this kernel has no such lockdown: {state.strip() or 'no lockdown'}")
    before = leftovers.attached(machine)
    for kind in (source, "auto"):
        assert_refused(kvmtrace(machine, f"events --source {kind}"), "lockdown")
    judged = kvmtrace(machine, f"doctor --source {source}")
    assert judged.status == 1
    assert re.search(r"✗ NO +lockdown +confidentiality", judged.stdout), judged.stdout
    assert judged.stderr == "", judged.stderr
    leftovers.assert_only(machine, before)


def without_bcc(machine: Machine, source: str, rounds: int = 200_000) -> None:
    """Without bcc and libbpf, bpf's hint names the package, and auto falls back to ftrace."""
    if source == "bpf":
        assert_refused(
            kvmtrace(machine, "events --source bpf"), "bcc is not installed", "python3-bpfcc"
        )
        return
    with watching(machine, "auto") as watch:
        status_line = watch.job.stderr.splitlines()[0]
        assert status_line.startswith(
            "kvmtrace: watching by ftrace (bpf does not work here: bcc is"
        ), status_line
        reports_sigbus_and_exit(machine, watch)
    if "run" not in watch.not_attached():
        storm(machine, "ftrace", rounds)
        end_following(machine)


def doctor(machine: Machine, source: str) -> Line:
    """Run ``kvmtrace doctor --json``; its exit status has to match its verdict."""
    result = kvmtrace(machine, f"doctor --source {source} --json")
    report: Line = json.loads(result.stdout)
    assert result.status == (0 if report["ok"] else 1)
    return report


def _attached(report: Line) -> set[str]:
    (tried,) = report["sources"]
    return {probe["name"] for probe in tried["probes"] if probe["attached"]}


def doctor_knows(machine: Machine, source: str) -> None:
    """doctor agrees with KVM's capability on whether the kernel has the memory-fault exit.

    The SIGBUS path works on every kernel.
    """
    if machine.row.arch.name != "amd64":
        raise Unstageable("KVM has no such capability on this architecture")
    vmm = Vmm(machine, "caps")
    has_exit = vmm.step("caps")["memory_fault_info"] > 0
    vmm.end()
    report = doctor(machine, source)
    (check,) = [x for x in report["checks"] if x["name"] == "memory-fault exit"]
    sees_exits = "run" in _attached(report)
    assert check["ok"] is has_exit, check
    assert report["ok"] is (has_exit and sees_exits), report["verdict"]
    if not has_exit:
        assert "6.8" in check["fix"], check
        wanted = "no memory-fault exit" if sees_exits else "cannot be seen here"
        assert wanted in report["verdict"]
    assert {"poison", "sigbus", "vm_gone"} <= _attached(report)
    with watching(machine, source) as watch:
        reports_sigbus_and_exit(machine, watch, exits=sees_exits)


def kvm_comes_and_goes(machine: Machine, source: str) -> None:
    """kvm is loaded after kvmtrace has started, unloaded and loaded again; kvmtrace re-attaches.

    By then it has given up the privileges that watching does not need.
    """
    away = f"modprobe -r {_kvm_modules(machine)} kvm && ! test -e /sys/module/kvm"
    if machine.run("test -e /sys/module/kvm && ! test -e /sys/module/kvm/initstate").status == 0:
        raise Unstageable("kvm is built in: it cannot be unloaded")
    _wait_until(machine, away)  # probes attached before may hold it a moment longer
    sees_exits: bool | None = None
    with watching(machine, source) as watch:
        for _ in range(2):
            machine.run(f"modprobe {_kvm_modules(machine)} && test -c /dev/kvm", check=True)
            if sees_exits is None:
                sees_exits = "run" in _attached(doctor(machine, source))
            _wait_for_probes(machine, watch, "exit" if sees_exits else "vm")
            reports_sigbus_and_exit(machine, watch, exits=sees_exits)
            privileges.assert_given_up(machine)
            # kvmtrace must not keep an admin from unloading kvm.
            _wait_until(machine, away)


def _kvm_modules(machine: Machine) -> str:
    return " ".join(machine.row.arch.kvm_modules)


def _wait_until(machine: Machine, command: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while (result := machine.run(command, timeout=PATIENCE)).status:
        assert time.monotonic() < deadline, f"never: {command}: {result.stderr}"
        time.sleep(0.5)


def _wait_for_probes(machine: Machine, watch: Watch, kind: str) -> None:
    """Wait until the probes on kvm are attached: until a line about a new VM comes."""
    deadline = time.monotonic() + PATIENCE
    seen: list[Line] = []
    while not seen:
        assert watch.job.poll() is None, watch.job.stderr
        assert time.monotonic() < deadline, f"kvm is loaded, but no {kind} is reported"
        vmm = Vmm(machine, "canary")
        vmm.step("create v backing=anon")
        vmm.step("unmap v +5")
        vmm.step("touch v +5")
        vmm.end()
        time.sleep(2)
        seen = [x for x in watch.lines(kind) if x["vm"]["pid"] == vmm.pid]
    if kind == "vm":
        # The probe for this is attached last.
        watch.until(vms_gone(vmm.pid), "the canary's end")


HOSTS = (
    Scenario(doctor_knows),
    Scenario(kaslr),
    Scenario(no_kvm_types),
    Scenario(no_tracefs),
    Scenario(unprivileged),
    Scenario(nokaslr, {"cmdline_extra": "nokaslr"}),
    Scenario(lockdown, {"cmdline_extra": "lockdown=confidentiality"}),
    Scenario(without_bcc, {"lacking": ("bcc",)}),
    Scenario(kvm_comes_and_goes, {"modules": ("hwpoison-inject",)}),
)
