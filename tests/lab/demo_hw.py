"""`make demo-hw`: (virtual) memory hardware fails; `top` and `explain` show the consequences.

The machine is an arm64 host whose firmware reports errors. `kvmtrace serve` runs from the start, as
on a real host; `top` and then `explain` connect to it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator

from tests.lab import cper
from tests.lab.demo import DISGUISES, FOREVER, Step, Story, steps
from tests.lab.errors import status_of
from tests.lab.harness import PATIENCE, start_serve
from tests.lab.machine import Machine, prepare
from tests.lab.progress import print_status

KERNEL = "arm64-newest"

INTRODUCTION = """\
lab: two VMs run in the machine, whose memory controller will report errors:
lab:   web-1 (disguised as QEMU)    loses a page, and its vCPU stops
lab:   db-1 (anonymous memory)      one page is moved in time; another is lost and replaced
lab: in `kvmtrace top`: enter for the whole story, tab for VMs, ? for help, q to quit"""

DIMM = cper.Dimm(node=0, card=0, module=1, handle=0x1100)  # the handle in QEMU's SMBIOS


class HardwareStory(Story):
    """The memory controller reports errors, and the kernel handles them."""

    def start_vms(self) -> None:
        """Start two VMs, whose second vCPUs make ordinary exits."""
        qemu = f"{DISGUISES}/qemu-system-aarch64 -uuid 7f6b8a52-3c1d-4c9e-9a44-0d2f5e6b7c81"
        for name, how, backing in (("web-1", qemu, "gmem"), ("db-1", "vmm", "anon")):
            touched = [f"touch v +{page}" for page in (5, 6, 7)]
            ordinary = f"pio v {FOREVER} gap_us=100000 vcpu=1 bg=1"
            self._start(name, how, f"create v vcpus=2 backing={backing}", *touched, ordinary)

    def _steps(self) -> Iterator[Step]:
        web, db = self._vms["web-1"], self._vms["db-1"]
        corrected, lost = cper.Severity.CORRECTED, cper.Severity.RECOVERABLE
        for _ in range(2):
            yield (
                "web-1: the memory controller corrects an error in one of its pages",
                self._fails("web-1", 5, corrected),
            )
        yield (
            "web-1: the next error is uncorrected; the kernel poisons the page",
            self._fails("web-1", 5, lost),
        )
        yield (
            "db-1: too many corrected errors in a page; the kernel moves its contents",
            self._fails("db-1", 6, corrected, cper.THRESHOLD_EXCEEDED),
        )
        yield "web-1: its guest touches the page; the VMM is notified", steps(web, "touch v +5")
        yield (
            "db-1: an uncorrected error; the kernel poisons the page",
            self._fails("db-1", 7, lost),
        )
        yield (
            "db-1: its guest touches the page; the VMM gets a SIGBUS and maps new memory",
            steps(db, "touch v +7", "remap v +7", f"pio v {FOREVER} gap_us=100000 bg=1"),
        )
        yield "kvmtrace observes what the VMMs do", lambda: self._machine.run("sleep 8")

    def _fails(
        self, name: str, page: int, severity: cper.Severity, flags: int = 0
    ) -> Callable[[], object]:
        def fail() -> None:
            pfn = self._vms[name].step(f"pfn v +{page}")["pfn"]
            address = (pfn << self._machine.page_shift) + 0x40
            cper.memory_error(self._machine, address, severity, flags=flags, dimm=DIMM)

        return fail


def show(machine: Machine, *, live: bool) -> int:
    """Run `top`, live or once at the end, then `explain`; return the exit status."""
    announce = (lambda _: None) if live else (lambda text: print_status(f"  {text}"))
    story = HardwareStory(machine, announce)
    story.start_vms()
    if live:
        print(INTRODUCTION, file=sys.stderr)
        with story.running():
            status = machine.attach("exec kvmtrace top")
        if status:
            return status
    else:
        print_status("no terminal: only the final table is printed")
        with story.running():
            machine.channel.wait(lambda: story.ended, PATIENCE * 5, "end of the story")
        _print(machine, "kvmtrace top --once")
    print_status("kvmtrace explain web-1")
    _print(machine, "kvmtrace explain web-1")
    return 0


def _print(machine: Machine, command: str) -> None:
    result = machine.run(command, timeout=PATIENCE)
    sys.stdout.write(result.stdout)
    sys.stderr.write(result.stderr)
    sys.stdout.flush()


def main() -> int:
    """Boot a machine and run the demo in it."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.demo_hw", description=__doc__)
    parser.add_argument("--source", choices=("auto", "bpf", "ftrace"), default="auto")
    parser.add_argument("--kernel", default=KERNEL, metavar="NAME")
    chosen = parser.parse_args()
    print_status("preparing (the first run downloads and builds for minutes) ...")
    prepare(chosen.kernel)
    print_status("booting an emulated arm64 machine with firmware ...")
    with Machine.boot(chosen.kernel, ras=True) as machine:
        print_status(f"Linux {machine.release} is up after {machine.boot_seconds:.0f} s")
        print_status("starting kvmtrace serve (compiling for eBPF takes up to a minute) ...")
        serve = start_serve(machine, f"--source {chosen.source}")
        status = show(machine, live=sys.stdin.isatty() and sys.stdout.isatty())
        serve.signal(signal.SIGTERM)
        return status or serve.wait(PATIENCE)


if __name__ == "__main__":
    sys.exit(status_of(main))
