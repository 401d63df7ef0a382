"""A real VMM loses a page: Debian's QEMU, run nested, with ordinary memory.

These scenarios establish how QEMU reacts by kind of memory. ``judgement/vmm_facts.py`` has only
what is tested here.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

from tests.lab.harness import (
    PATIENCE,
    Line,
    Unstageable,
    Vmm,
    end_following,
    following,
    serving,
)
from tests.lab.hosts import doctor
from tests.lab.machine import Machine

FIRMWARE = "/tmp/firmware"
NAME, UUID = "tenant-7", "6f2c1f0e-93a5-4b0e-9d53-2d0f4c1f5a77"

MIB = 1 << 20
SIZE = 64 * MIB
HUGE_PAGES = SIZE // (2 * MIB)
MEMORY = {
    "anonymous": "memory-backend-ram",
    "memfd": "memory-backend-memfd,share=on",
    "hugetlb": "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
}

# A guest address that the guest never touches, so that only the VMM can access the lost page.
UNTOUCHED = 16 * MIB


def _firmware() -> tuple[bytes, bytes]:
    """Assemble the guest: the start of its ROM, and the reset vector's code (the last 16 bytes).

    It touches its first page, prints "up" on the debug console, then increments a word in that page
    about once a second; that is slow, so that it rarely interferes with memory_failure. "r" on its
    serial line makes it reboot, "s" or the power button shut down. SeaBIOS was not usable: in 2 of
    200 starts under double emulation it spun in its timeouts for minutes.
    """

    def hexadecimal(*lines: str) -> bytes:
        return b"".join(bytes.fromhex(line) for line in lines)

    def out(port: int, value: int) -> bytes:  # mov dx, port; mov eax, value; out dx, eax
        return b"\xba%b\x66\xb8%b\x66\xef" % (
            port.to_bytes(2, "little"),
            value.to_bytes(4, "little"),
        )

    def back(opcode: int) -> bytes:  # a jump to `again`
        return bytes([opcode, (again - len(code) - 2) & 0xFF])

    code = hexadecimal(
        "ff060005", "ba0204", "b075ee", "b070ee", "b00aee"
    )  # inc word [0x500]; "up\n"
    # PIIX4's power management: its registers at 0xb000, enabled, the power button too.
    function = 0x8000_0000 | 1 << 11 | 3 << 8
    code += out(0xCF8, function | 0x40) + out(0xCFC, 0xB001)
    code += out(0xCF8, function | 0x80) + out(0xCFC, 1)
    code += hexadecimal("ba02b0", "b80001", "ef")
    again = len(code)
    code += hexadecimal("ff060005", "66b900000004", "67e2fd")  # mov ecx, 1 << 26; addr32 loop $
    code += hexadecimal("ba00b0", "ed", "f6c401", "7500")  # the power button? jnz to `off`
    pressed = len(code)
    code += hexadecimal("bafd03", "ec", "a801")  # does the serial line have a byte?
    code += back(0x74)  # jz
    code += hexadecimal("baf803", "ec")  # which one?
    code += hexadecimal("3c72", "7506", "baf90c", "b006", "ee")  # "r": out 0xcf9, 6
    code += hexadecimal("3c73")  # "s"
    code += back(0x75)  # jnz
    code = code[: pressed - 1] + bytes([len(code) - pressed]) + code[pressed:]  # `off` is here
    code += hexadecimal("ba04b0", "b80020", "ef", "ebfe")  # soft off
    return code, hexadecimal("e90d00")  # jmp on to 0x0000


_WRITE_FIRMWARE = """
import sys
code, reset = (bytes.fromhex(text) for text in sys.argv[2:])
open(sys.argv[1], "wb").write(code.ljust(0xfff0, b"\\0") + reset.ljust(16, b"\\0"))
"""

# Poisons a page of the guest: PID, size of the guest's memory, guest physical address.
_POISON = """
import json, os, struct, sys
pid, size, gpa = map(int, sys.argv[1:])
for line in open(f"/proc/{pid}/maps"):
    begin, end = (int(x, 16) for x in line.split()[0].split("-"))
    if end - begin >= size:
        break
hva = begin + gpa
page = os.sysconf("SC_PAGESIZE")
with open(f"/proc/{pid}/pagemap", "rb") as pagemap:
    pagemap.seek(hva // page * 8)
    pfn = struct.unpack("Q", pagemap.read(8))[0] & (1 << 55) - 1
assert pfn, "the page is not there"
try:
    with open("/sys/kernel/debug/hwpoison/corrupt-pfn", "w") as corrupt:
        corrupt.write(f"{pfn:#x}")
except OSError:
    pass  # some kernels answer EBUSY although the page is poisoned
print(json.dumps({"pfn": pfn, "hva": hva}))
"""


def write_firmware(machine: Machine) -> None:
    """Put the guest into ``FIRMWARE``. Unstageable without QEMU."""
    if machine.run("command -v qemu-system-x86_64").status:
        raise Unstageable("no QEMU in this root")
    code, reset = _firmware()
    words = ["python3", "-c", _WRITE_FIRMWARE, FIRMWARE, code.hex(), reset.hex()]
    machine.run(words, check=True)


def poison_guest(machine: Machine, pid: int, gpa: int) -> Line:
    """Poison a page of a QEMU with that guest; return its pfn and hva."""
    words = ["python3", "-c", _POISON, str(pid), str(SIZE), str(gpa)]
    return dict(json.loads(machine.run(words, check=True, timeout=PATIENCE).stdout))


class Qemu:
    """A QEMU with that guest and a QMP connection. ``memory``: a key of ``MEMORY``."""

    def __init__(
        self, machine: Machine, memory: str = "anonymous", *, reboots: bool = True
    ) -> None:
        write_firmware(machine)
        machine.run("rm -f /tmp/qemu.*; mkfifo /tmp/qemu.serial", check=True)
        self._machine = machine
        self.job = machine.start(
            f"exec qemu-system-x86_64 -accel kvm -name guest={NAME},debug-threads=on -uuid {UUID} "
            f"-m 64 -object {MEMORY[memory]},id=ram,size=64M,prealloc=on "
            f"-machine pc,memory-backend=ram -bios {FIRMWARE} -nodefaults -display none "
            f"{'' if reboots else '-no-reboot '}-pidfile /tmp/qemu.pid "
            "-chardev file,id=console,path=/tmp/qemu.console "
            "-device isa-debugcon,iobase=0x402,chardev=console "
            "-chardev pipe,id=serial,path=/tmp/qemu.serial -device isa-serial,chardev=serial "
            "-chardev stdio,id=qmp -mon chardev=qmp,mode=control"
        )
        self._read = 0
        self._line()  # the greeting
        self.qmp("qmp_capabilities")
        self.pid = int(machine.run("cat /tmp/qemu.pid", check=True).stdout)
        self.wait_for_boots(1)

    def qmp(self, command: str, **arguments: object) -> Any:
        """Send a command; return the value of the answer, or {"error": text}."""
        self.send_qmp(command, **arguments)
        while "event" in (answer := self._line()):
            pass
        return answer.get("return", {"error": answer.get("error", {}).get("desc")})

    def send_qmp(self, command: str, **arguments: object) -> None:
        """Send a command without waiting for an answer."""
        self.job.send(json.dumps({"execute": command, "arguments": arguments}) + "\n")

    def _line(self) -> Line:
        text = self.job.wait_for(lambda all_: "\n" in all_[self._read :], timeout=PATIENCE)
        end = text.index("\n", self._read) + 1
        line, self._read = text[self._read : end], end
        return dict(json.loads(line))

    def monitor(self, command: str) -> Any:
        """Send a command to its human monitor; return the answer."""
        return self.qmp("human-monitor-command", **{"command-line": command})

    def send_serial(self, letter: str) -> None:
        """Send a letter to the guest's serial line."""
        self._machine.run(f"echo -n {letter} > /tmp/qemu.serial", check=True)

    def wait_for_boots(self, times: int) -> None:
        """Wait until the guest has booted that many times."""
        deadline = time.monotonic() + PATIENCE
        while self._machine.run("grep -c up /tmp/qemu.console").stdout.strip() != str(times):
            assert time.monotonic() < deadline, "the guest does not boot"
            assert self.job.poll() is None, (self.job.poll(), self.job.stderr)
            time.sleep(0.1)

    def poison(self, gpa: int) -> Line:
        """Poison a page; return its pfn and hva."""
        return poison_guest(self._machine, self.pid, gpa)

    def is_running(self) -> bool:
        """Whether the VM is running."""
        return bool(self.qmp("query-status")["running"])

    def migrate(self) -> str | None:
        """Migrate it; None on success, else QEMU's error."""
        refused = self.qmp("migrate", uri="exec:cat >/dev/null")
        if refused:
            return str(refused["error"])
        deadline = time.monotonic() + PATIENCE
        while (state := self.qmp("query-migrate"))["status"] not in ("completed", "failed"):
            assert time.monotonic() < deadline, state
            time.sleep(0.1)
        return None if state["status"] == "completed" else str(state.get("error-desc"))

    def dump(self) -> str | None:
        """Dump its memory; None on success, else QEMU's error."""
        arguments = {"paging": False, "protocol": "file:/tmp/qemu.dump"}
        answer = self.qmp("dump-guest-memory", **arguments)
        return str(answer["error"]) if answer else None

    def add_disk(self) -> None:
        """Attach a disk that can hold a snapshot of the VM."""
        self._machine.run(": > /tmp/qemu.disk", check=True)
        file = {"driver": "file", "node-name": "file", "filename": "/tmp/qemu.disk"}
        image = {"driver": "qcow2", "file": "file"}
        assert self.qmp("blockdev-add", **file) == {}
        made = self.qmp("blockdev-create", **{"job-id": "disk", "options": image | {"size": MIB}})
        assert made == {}
        deadline = time.monotonic() + PATIENCE
        while (job := self.qmp("query-jobs")[0])["status"] != "concluded":
            assert time.monotonic() < deadline, job
            time.sleep(0.1)
        assert "error" not in job, job
        assert self.qmp("blockdev-add", **image, **{"node-name": "disk"}) == {}

    def end(self) -> None:
        """End it as ``virsh destroy`` does."""
        self.job.kill()
        self.job.wait(PATIENCE)


@contextlib.contextmanager
def _qemu(machine: Machine, memory: str, *, reboots: bool = True) -> Iterator[Qemu]:
    qemu = Qemu(machine, memory, reboots=reboots)
    try:
        yield qemu
    finally:
        qemu.end()


@contextlib.contextmanager
def _huge_pages(machine: Machine) -> Iterator[None]:
    """Provide huge pages for one QEMU and one more page; restore the number afterwards."""
    setting = "/proc/sys/vm/nr_hugepages"
    before = machine.run(f"cat {setting}", check=True).stdout.strip()
    wanted = int(before) - _free_huge_pages(machine) + HUGE_PAGES + 1
    machine.run(f"echo {wanted} > {setting}", check=True)
    try:
        if _free_huge_pages(machine) != HUGE_PAGES + 1:
            raise Unstageable("too few huge pages")
        yield
    finally:
        machine.run(f"echo {before} > {setting}", check=True)


def _free_huge_pages(machine: Machine) -> int:
    meminfo = machine.run("cat /proc/meminfo", check=True).stdout
    found = re.search(r"^HugePages_Free: +(\d+)", meminfo, re.MULTILINE)
    return int(found[1]) if found else 0


def qemu_with_a_page_gone(machine: Machine, _source: str) -> None:
    """Which commands QEMU can carry out while a page of its memory is lost, for each kind."""
    for memory in MEMORY:
        check_with_page_gone(machine, memory)


def check_with_page_gone(machine: Machine, memory: str) -> None:
    """Check this for one kind of memory. The guest has not touched the page."""
    lost: list[int] = []

    def poison(qemu: Qemu) -> None:
        lost.append(qemu.poison(UNTOUCHED)["pfn"])

    def assert_all_is_well(qemu: Qemu) -> None:
        assert qemu.monitor(f"xp /1wx {UNTOUCHED:#x}").split()[-1] == "0x00000000"
        assert qemu.dump() is None
        assert qemu.migrate() is None

    with contextlib.ExitStack() as stack:
        if memory == "hugetlb":
            stack.enter_context(_huge_pages(machine))
        stack.callback(_unpoison, machine, lost)
        with _qemu(machine, memory) as qemu:
            poison(qemu)
            assert "hardware poisoned memory" in (qemu.migrate() or "")
            assert "Bad address" in (qemu.dump() or "")
            qemu.qmp("stop")
            qemu.qmp("cont")
            assert qemu.is_running()
            assert "hardware poisoned memory" in (qemu.migrate() or "")  # stop and cont do not help
            qemu.monitor("system_reset")
            qemu.wait_for_boots(2)
            assert_all_is_well(qemu)
        _unpoison(machine, lost)
        with _qemu(machine, memory) as qemu:
            poison(qemu)
            qemu.send_serial("r")
            qemu.wait_for_boots(2)
            assert_all_is_well(qemu)
        _unpoison(machine, lost)
        with _qemu(machine, memory) as qemu:
            poison(qemu)
            qemu.send_serial("s")
            assert qemu.job.wait(PATIENCE) == 0
        with _qemu(machine, memory) as qemu:  # started again
            assert_all_is_well(qemu)
        _unpoison(machine, lost)
        # Any read of the page in QEMU kills it with SIGBUS (a shell shows status 135).
        for command in (f"xp /1wx {UNTOUCHED:#x}", "savevm one"):
            with _qemu(machine, memory) as qemu:
                qemu.add_disk()
                poison(qemu)
                qemu.send_qmp("human-monitor-command", **{"command-line": command})
                assert qemu.job.wait(PATIENCE) == -signal.SIGBUS, command
            _unpoison(machine, lost)
        if memory == "hugetlb":
            machine.run(
                "echo $(($(cat /proc/sys/vm/nr_hugepages) - 1)) > /proc/sys/vm/nr_hugepages"
            )
            with _qemu(machine, memory) as qemu:
                poison(qemu)
                assert _free_huge_pages(machine) == 0
                qemu.monitor("system_reset")
                qemu.wait_for_boots(2)
                qemu.send_qmp("human-monitor-command", **{"command-line": f"xp {UNTOUCHED:#x}"})
                assert qemu.job.wait(PATIENCE) == -signal.SIGBUS
            again = machine.run(
                f"qemu-system-x86_64 -m 64 -object {MEMORY[memory]},id=ram,size=64M,prealloc=on "
                "-machine pc,memory-backend=ram -nodefaults -display none -accel kvm"
            )
            assert again.status > 0
            assert "Cannot allocate memory" in again.stderr


def _unpoison(machine: Machine, pfns: list[int]) -> None:
    """Unpoison the pages, so that later scenarios have enough huge pages.

    The kernel refuses with EIO until the killed process has released a page.
    """
    while pfns:
        command = f"echo {pfns.pop():#x} > /sys/kernel/debug/hwpoison/unpoison-pfn"
        for _ in range(20):
            if machine.run(command).status == 0:
                break
            time.sleep(0.5)
        else:
            machine.run(command, check=True)


def qemu_loses_a_page(machine: Machine, source: str) -> None:
    """kvmtrace names QEMU by its -name; its vCPU thread gets the SIGBUS, and QEMU ends."""
    with (
        following(machine, source) as (watch,),
        _qemu(machine, "anonymous", reboots=False) as qemu,
    ):
        poisoned = qemu.poison(0)

        def vcpu_signals(lines: list[Line]) -> list[Line]:
            signals = [
                x for x in lines if x["kind"] == "sigbus" and x.get("vm", {}).get("pid") == qemu.pid
            ]
            return [x for x in signals if x["code"] == "AR"]

        watch.until(vcpu_signals, "QEMU's vCPU thread is notified", patience=PATIENCE)
        status = qemu.job.wait(
            PATIENCE
        )  # the guest cannot handle the machine check and resets: -no-reboot

        def gone(lines: list[Line]) -> bool:
            ends = [x for x in lines if x["kind"] == "vm" and x["state"] == "gone"]
            return any(x["vm"]["pid"] == qemu.pid for x in ends)

        lines = watch.until(gone, "QEMU's end")
    (poison,) = [x for x in lines if x["kind"] == "poison" and x["pfn"] == poisoned["pfn"]]
    sent = vcpu_signals(lines)[0]
    assert (sent["vm"]["name"], sent["vm"]["uuid"]) == (NAME, UUID)
    assert sent["hva"] == poisoned["hva"]
    assert sent.get("gfn") == 0
    if sent["ts"] > poison["ts"]:
        assert sent.get("incident") == poison["incident"], (poison, sent)
    assert "memory error" in qemu.job.stderr.lower() or status != 0, (status, qemu.job.stderr)


def qemu_advice(machine: Machine, source: str) -> None:
    """Following kvmtrace's advice about a page that QEMU has lost resolves the incident."""
    end_following(machine)
    with serving(machine, f"--source {source}"):
        _early_notification(machine)
        for memory in MEMORY:
            _follow_advice(machine, memory)


def _early_notification(machine: Machine) -> None:
    """`doctor` names who is notified early: QEMU, which asks for it, and not the lab's VMM."""
    vmm = Vmm(machine, "patient")
    vmm.step("create v backing=anon")
    with _qemu(machine, "anonymous") as qemu:
        (check,) = [
            x for x in doctor(machine, "auto")["checks"] if x["name"] == "early notification"
        ]
        assert check["found"] == (
            f"when a page is poisoned: {NAME} ({qemu.pid}); "
            f"only when a guest accesses it: patient ({vmm.pid})"
        )
        assert "memory_failure_early_kill=1" in check["fix"]
        # What the kernel does is the truth: both lose a page that neither has touched since.
        of_qemu = qemu.poison(UNTOUCHED)["pfn"]
        of_vmm = vmm.step("pfn v +3")["pfn"]
        hammer = Vmm(machine, "hammer")
        hammer.step(f"poison pfn={of_vmm}")
        hammer.end()
        notified = advised(machine, of_qemu, "its VMM was notified before its guest touched")
        assert notified[0].startswith(f"shut {NAME} down")
        advised(machine, of_vmm, "its guest has not touched")
    assert vmm.end()["sigbus"] == []


def _follow_advice(machine: Machine, memory: str) -> None:
    with contextlib.ExitStack() as stack:
        if memory == "hugetlb":
            stack.enter_context(_huge_pages(machine))
        lost: list[int] = []
        stack.callback(_unpoison, machine, lost)
        qemu = stack.enter_context(_qemu(machine, memory))
        pfn = qemu.poison(UNTOUCHED)["pfn"]
        lost.append(pfn)
        steps = advised(machine, pfn, "monitor: system_reset")
        assert steps[0].startswith(f"shut {NAME} down from inside the guest and start it again")
        assert f"libvirt: virsh reset {NAME}" in steps[1]
        assert steps[-1].startswith(f"until then do not migrate, save, snapshot or dump {NAME}")
        assert ("free huge page" in steps[2]) == (memory == "hugetlb"), steps
        qemu.monitor("system_reset")
        qemu.wait_for_boots(2)
        if memory != "hugetlb":  # its page table does not show that
            advised(machine, pfn, "nothing: another page was put in place of the lost one")
        assert qemu.migrate() is None


def advised(machine: Machine, pfn: int, words: str) -> list[str]:
    """Wait until the steps that `explain` prints for a page contain ``words``."""
    deadline = time.monotonic() + PATIENCE
    while True:
        answer = machine.run(["kvmtrace", "explain", f"{pfn:#x}", "--json"], timeout=PATIENCE)
        incidents = json.loads(answer.stdout) if answer.status == 0 else []
        steps = [step for incident in incidents for step in incident["next"]]
        if any(words in step for step in steps):
            return steps
        assert time.monotonic() < deadline, (answer, steps)
        time.sleep(0.5)
