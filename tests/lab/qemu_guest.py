"""A VMM that nobody here wrote: Debian's QEMU, nested, with ordinary memory, loses a page."""

from __future__ import annotations

import json

from tests.lab.drive import PATIENCE, Line, Unstageable, following
from tests.lab.machine import Machine

NAME, UUID = "tenant-7", "6f2c1f0e-93a5-4b0e-9d53-2d0f4c1f5a77"

# The firmware of its guest: touches its first page, says "up" on the debug console, then counts in
# that page about once a second, so that it seldom does while memory_failure is still at work on it.
# SeaBIOS will not do: under two emulations it spun in its timeouts for minutes, in 2 of 200 starts.
_FIRMWARE = """
import sys
code = bytes.fromhex("ff060005"  # inc word [0x500]
                     "ba0204" "b075ee" "b070ee" "b00aee"  # mov dx, 0x402; mov al, 'u'; out dx, al
                     "ff060005"  # again: inc word [0x500]
                     "66b900000004" "67e2fd"  # mov ecx, 1 << 26; addr32 loop $
                     "ebf1")  # jmp again
reset = bytes.fromhex("e90d00")  # at 0xfff0, 16 bytes below the end: jmp on to 0x0000
open(sys.argv[1], "wb").write(code.ljust(0xfff0, b"\\0") + reset.ljust(16, b"\\0"))
"""

# Poisons the guest's first page.
_POISON_FIRST_PAGE = """
import json, os, struct, sys
pid, size = int(sys.argv[1]), int(sys.argv[2])
for line in open(f"/proc/{pid}/maps"):
    begin, end = (int(x, 16) for x in line.split()[0].split("-"))
    if end - begin >= size:
        break
page = os.sysconf("SC_PAGESIZE")
with open(f"/proc/{pid}/pagemap", "rb") as pagemap:
    pagemap.seek(begin // page * 8)
    pfn = struct.unpack("Q", pagemap.read(8))[0] & (1 << 55) - 1
try:
    with open("/sys/kernel/debug/hwpoison/corrupt-pfn", "w") as corrupt:
        corrupt.write(f"{pfn:#x}")
except OSError:
    pass  # some kernels answer EBUSY although the page is poisoned
print(json.dumps({"pfn": pfn, "hva": begin}))
"""


def qemu_loses_a_page(machine: Machine, source: str) -> None:
    """QEMU is named by its -name, its vCPU thread gets the SIGBUS, and it ends."""
    if machine.run("command -v qemu-system-x86_64").status:
        raise Unstageable("no QEMU in this root")
    machine.run(["python3", "-c", _FIRMWARE, "/tmp/firmware"], check=True)
    with following(machine, source) as (watch,):
        qemu = machine.start(
            f"exec qemu-system-x86_64 -accel kvm -name guest={NAME},debug-threads=on -uuid {UUID} "
            "-m 64 -bios /tmp/firmware -nodefaults -display none -no-reboot -monitor none "
            "-chardev stdio,id=console -device isa-debugcon,iobase=0x402,chardev=console"
        )
        qemu.wait_for("up", timeout=PATIENCE)
        pid = int(machine.run("pgrep -f [q]emu-system-x86_64", check=True).stdout.split()[0])
        poisoned = json.loads(
            machine.run(
                ["python3", "-c", _POISON_FIRST_PAGE, str(pid), str(64 << 20)],
                check=True,
                timeout=PATIENCE,
            ).stdout
        )

        def told(lines: list[Line]) -> list[Line]:
            signals = [
                x for x in lines if x["kind"] == "sigbus" and x.get("vm", {}).get("pid") == pid
            ]
            return [x for x in signals if x["code"] == "AR"]

        lines = watch.until(told, "QEMU's vCPU thread is told", patience=PATIENCE)
        status = qemu.wait(PATIENCE)  # its guest handles no machine check: reset, -no-reboot

        def gone(lines: list[Line]) -> bool:
            return any(
                x["kind"] == "vm" and x["vm"]["pid"] == pid and x["state"] == "gone" for x in lines
            )

        lines = watch.until(gone, "QEMU's end")
    (poison,) = [x for x in lines if x["kind"] == "poison" and x["pfn"] == poisoned["pfn"]]
    signal = told(lines)[0]
    assert (signal["vm"]["name"], signal["vm"]["uuid"]) == (NAME, UUID)
    assert signal["hva"] == poisoned["hva"]
    assert signal.get("gfn") == 0
    if signal["ts"] > poison["ts"]:
        assert signal.get("incident") == poison["incident"], (poison, signal)
    assert "memory error" in qemu.stderr.lower() or status != 0, (status, qemu.stderr)
