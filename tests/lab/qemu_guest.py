"""A VMM that nobody here wrote: Debian's QEMU, nested, with ordinary memory, loses a page."""

from __future__ import annotations

import json

from tests.lab.drive import PATIENCE, Line, Unstageable, following
from tests.lab.machine import Machine

NAME, UUID = "tenant-7", "6f2c1f0e-93a5-4b0e-9d53-2d0f4c1f5a77"

# Poisons the guest's first page: the BIOS counts timer interrupts in there.
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
    with following(machine, source) as (watch,):
        qemu = machine.start(
            f"exec qemu-system-x86_64 -accel kvm -name guest={NAME},debug-threads=on -uuid {UUID} "
            "-m 64 -nodefaults -display none -no-reboot -monitor none "
            "-chardev stdio,id=bios -device isa-debugcon,iobase=0x402,chardev=bios"
        )
        qemu.wait_for("No bootable device|Booting from", timeout=PATIENCE)
        pid = int(machine.run("pgrep -f [q]emu-system-x86_64", check=True).stdout.split()[0])
        poisoned = json.loads(
            machine.run(
                ["python3", "-c", _POISON_FIRST_PAGE, str(pid), str(64 << 20)],
                check=True,
                timeout=PATIENCE,
            ).stdout
        )

        def told(lines: list[Line]) -> list[Line]:
            signals = [x for x in lines if x["kind"] == "sigbus" and x["vm"]["pid"] == pid]
            return [x for x in signals if x["code"] == "AR"]

        lines = watch.until(told, "QEMU's vCPU thread is told", patience=PATIENCE)
        status = qemu.wait(PATIENCE)  # the BIOS cannot handle a machine check: reset, -no-reboot

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
    assert signal.get("incident") == poison["incident"], (poison, told(lines))
    assert "memory error" in qemu.stderr.lower() or status != 0, (status, qemu.stderr)
