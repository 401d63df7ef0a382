"""`make demo`: memory of running VMs fails, and `kvmtrace top` shows it live.

Each failure starts with a machine check; the kernel itself poisons the pages. On a terminal the
demo runs until `q`; without one, it prints the final table.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.lab import leftovers, mca
from tests.lab.config import row
from tests.lab.errors import LabError, status_of
from tests.lab.harness import PATIENCE, Vmm
from tests.lab.machine import DEFAULT, Machine, prepare
from tests.lab.progress import print_status

PACE = 2.5  # seconds between two steps, so that people can follow
FOREVER = 1_000_000_000

INTRODUCTION = """\
lab: three VMs run in the machine, whose hardware will report memory errors:
lab:   web-1 (disguised as QEMU)        is notified of a poisoned page, and loops
lab:   db-1 (disguised as Firecracker)  holds a poisoned page, loses other memory
lab:   cache-1 (anonymous memory)       loses a mapping, and gets a SIGBUS
lab: in `kvmtrace top`: enter for the whole story, tab for VMs, ? for help, q to quit"""

DISGUISES = "/tmp/demo"
VMM_COMMANDS = {
    "web-1": f"{DISGUISES}/qemu-system-x86_64 -uuid 7f6b8a52-3c1d-4c9e-9a44-0d2f5e6b7c81",
    "db-1": f"{DISGUISES}/firecracker --id db-1",
    "cache-1": "vmm",
}


Step = tuple[str, Callable[[], object]]


class Story:
    """A sequence of steps that happen to VMs; `announce` is called with the text of each."""

    def __init__(self, machine: Machine, announce: Callable[[str], None] = lambda _: None) -> None:
        self._announce = announce
        self._machine = machine
        self._vms: dict[str, Vmm] = {}
        self.stopped = threading.Event()
        self.ended = False
        self.failure: Exception | None = None

    def _run(self) -> None:
        try:
            for text, what in self._steps():
                if self.stopped.wait(PACE):
                    return
                self._announce(text)
                what()
        except (LabError, AssertionError) as failure:
            if not self.stopped.is_set():
                self.failure = failure
        finally:
            self.ended = True

    def _steps(self) -> Iterator[Step]:
        raise NotImplementedError

    def start_vms(self) -> None:
        """Start the VMs and let them touch their memory."""
        raise NotImplementedError

    def _start(self, name: str, how: str, *steps: str) -> None:
        """Start the lab's VMM by this command line, copied to the name that it gives."""
        program = how.partition(" ")[0]
        if program != "vmm":
            dress = f"mkdir -p {DISGUISES} && cp $(command -v vmm) {program}"
            self._machine.run(dress, check=True)
        vmm = self._vms[name] = Vmm(self._machine, name, program=how)
        for text in steps:
            vmm.step(text)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the steps in a thread during the block; raise its LabError at the end."""
        thread = threading.Thread(target=self._run, name="story", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.stopped.set()
            thread.join(PATIENCE)
        if self.failure is not None:
            raise LabError(f"a step of the demo failed: {self.failure}") from self.failure


def steps(vmm: Vmm, *texts: str) -> Callable[[], object]:
    """Return a callable that runs these steps."""
    return lambda: [vmm.step(text) for text in texts]


class PoisonStory(Story):
    """Memory fails, the kernel poisons the pages, and VMMs are notified."""

    def _steps(self) -> Iterator[Step]:
        web, db, cache = (self._vms[name] for name in VMM_COMMANDS)
        if not self._wait_until_attached():
            return
        yield (
            "machine check: a corrected error in a page of web-1",
            lambda: mca.inject(self._machine, mca.CORRECTED, self._address(web, 5)),
        )
        yield (
            "machine check: the next error is uncorrected; the kernel poisons the page",
            self._poison(web, 5),
        )
        yield (
            "machine check: a page of db-1 is poisoned, and nobody touches it",
            self._poison(db, 7),
        )
        yield "web-1: its guest touches the page; the VMM is notified", steps(web, "touch v +5")
        yield (
            "web-1: the VMM re-enters the guest in a loop, and is notified each time",
            steps(web, f"loop v +5 {FOREVER} gap_us=2000 bg=1"),
        )
        yield (
            "db-1: part of its guest_memfd is closed: EFAULT, no incident",
            steps(db, "close-gmem v slot=2", "touch v +40"),
        )
        yield (
            "cache-1: memory is unmapped: EFAULT without an address",
            steps(cache, "unmap v +9", "touch v +9"),
        )
        yield "machine check: a page of cache-1 is poisoned", self._poison(cache, 5)
        yield (
            "cache-1: its guest touches the page; the VMM gets a SIGBUS",
            steps(cache, "touch v +5"),
        )
        yield "machine check: another page of web-1 is poisoned", self._poison(web, 6)

    def _poison(self, vmm: Vmm, page: int) -> Callable[[], object]:
        return lambda: mca.inject_poison(self._machine, self._address(vmm, page))

    def _address(self, vmm: Vmm, page: int) -> int:
        return mca.address_in(self._machine, vmm.step(f"pfn v +{page}")["pfn"])

    def start_vms(self) -> None:
        """Start three VMs, on a host that polls its machine check banks often."""
        mca.poll_often(self._machine)
        for name, how in VMM_COMMANDS.items():
            more = "backing=anon" if name == "cache-1" else "backing=gmem slots=2 files=each"
            touched = [f"touch v +{page}" for page in (5, 6, 7, 40)]
            ordinary = f"pio v {FOREVER} gap_us=100000 vcpu=1 bg=1"
            self._start(name, how, f"create v vcpus=2 {more}", *touched, ordinary)

    def _wait_until_attached(self) -> bool:
        """Wait until one of the last probes is attached and no more follow; False if stopped first.

        An event in between would be seen by some probes only.
        """
        before: leftovers.Attached = {}
        while not self.stopped.wait(PACE):
            now = leftovers.attached_probes(self._machine)
            functions = map(str, now["functions"])
            watched = any(one.startswith("kvm_destroy_vm") for one in functions)
            if watched and now == before:
                return True
            before = now
        return False


def show_live(machine: Machine, source: str) -> int:
    """Run `kvmtrace top` on this terminal until it is quit."""
    story = PoisonStory(machine)
    story.start_vms()
    print(INTRODUCTION, file=sys.stderr)
    print_status(
        "starting kvmtrace top (compiling for eBPF takes up to a minute under emulation) ..."
    )
    with story.running():
        status = machine.attach(f"exec kvmtrace top --source {source}")
    if status == 0:
        print_status("end of the demo. `make lab` opens a shell in such a machine")
    return status


def print_final_table(machine: Machine, source: str) -> int:
    """Print the table after the last step."""
    story = PoisonStory(machine, lambda text: print_status(f"  {text}"))
    story.start_vms()
    print_status(
        "no terminal: only the final table is printed; starting kvmtrace (up to a minute) ..."
    )
    top = machine.start(f"exec kvmtrace top --once --source {source} --interval 1h")
    with story.running():
        machine.channel.wait(lambda: story.ended or top.poll() is not None, PATIENCE * 5, "end")
        if story.ended:
            machine.run("sleep 2")  # kvmtrace has to read the last events
            top.signal(signal.SIGINT)
        status = top.wait(PATIENCE)
    sys.stdout.write(top.stdout)
    sys.stderr.write(top.stderr)
    return status


def main() -> int:
    """Boot a machine and run the demo in it."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.demo", description=__doc__)
    parser.add_argument("--source", choices=("auto", "bpf", "ftrace"), default="auto")
    parser.add_argument("--kernel", default=DEFAULT, metavar="NAME")
    parser.add_argument(
        "--lacking", action="append", default=[], metavar="NAME", help="boot without it (bcc)"
    )
    chosen = parser.parse_args()
    if row(chosen.kernel).arch.name != "amd64":
        parser.error("only x86 has machine checks; for arm64 run `make demo-hw`")
    print_status("preparing (the first run downloads and builds for minutes) ...")
    prepare(chosen.kernel)
    print_status("booting an emulated machine ...")
    with Machine.boot(chosen.kernel, lacking=chosen.lacking) as machine:
        print_status(f"Linux {machine.release} is up after {machine.boot_seconds:.0f} s")
        show = show_live if sys.stdin.isatty() and sys.stdout.isatty() else print_final_table
        return show(machine, chosen.source)


if __name__ == "__main__":
    sys.exit(status_of(main))
