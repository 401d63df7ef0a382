"""`kvmtrace top` on a real kernel: live in a terminal (tmux), and with --once."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.lab.harness import PATIENCE, Line, Vmm
from tests.lab.machine import Job, Machine

pytestmark = pytest.mark.lab

FOREVER = 1_000_000_000
TMUX = "tmux -L kvmtrace"


@dataclass
class Tmux:
    """A shell in tmux: its screen and its keyboard."""

    machine: Machine
    job: Job

    def screen(self) -> str:
        return self.machine.run(f"{TMUX} capture-pane -p", check=True).stdout

    def keys(self, *keys: str) -> None:
        """Press keys, by tmux's names."""
        self.machine.run([*TMUX.split(), "send-keys", *keys], check=True)

    def until(self, pattern: str) -> str:
        """Wait until the screen matches; return it."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, seen := self.screen(), re.MULTILINE):
            assert time.monotonic() < deadline, f"never on the screen: {pattern}\n{seen}"
            time.sleep(0.3)
        return seen

    def modes(self) -> str:
        """Modes of the terminal and its tty, which a program may leave changed."""
        names = "alternate_on cursor_flag mouse_any_flag keypad_flag wrap_flag".split()
        form = " ".join(f"#{{{name}}}" for name in names)
        tty = self.machine.run(f"{TMUX} display -p '#{{pane_tty}}'", check=True).stdout.strip()
        shown = self.machine.run(f"{TMUX} display -p '{form}'; stty -a -F {tty}", check=True)
        # "rows" is the size, not a mode
        return re.sub(r"rows \d+; columns \d+; ", "", shown.stdout)


@pytest.fixture
def sick(machine: Machine) -> Iterator[Vmm]:
    """A VM with a page to be poisoned."""
    vmm = Vmm(machine, "sick")
    vmm.step("create v backing=gmem pages=32")
    vmm.step("touch v +3")
    yield vmm
    vmm.job.kill()


def test_the_live_table(machine: Machine, sick: Vmm) -> None:
    """Use all functions of `top` in one run."""
    other = Vmm(machine, "well")
    other.step("create v backing=anon")
    env = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
    shell = f"exec {TMUX} -f /dev/null new-session 'PS1=shell: exec sh' \\; set status off"
    tmux = Tmux(machine, machine.start(shell, pty=(24, 80), env=env))
    try:
        tmux.job.wait_for("shell:", timeout=PATIENCE)
        before = tmux.modes()
        tmux.keys("clear; kvmtrace top --source bpf; echo status $?", "Enter")
        tmux.until(r"nothing to do(?s:.*)\[VMs \d+\](?s:.*)sick")
        assert "well" in tmux.screen()

        # Events show up
        poison = sick.step("poison v +3")
        page = f"sick +{poison['pfn']:x}-1"
        tmux.until(f"latent +{page} .* not yet ")
        sick.step("touch v +3")
        tmux.until(f"(unclear|stopped|handled) +{page} .* once ")
        sick.step(f"loop v +3 {FOREVER} gap_us=20000 bg=1")
        tmux.until(f"looping +{page} ")
        tmux.until("^sick has been stuck on a poisoned page")
        assert all(len(line) <= 80 for line in tmux.screen().splitlines())

        # The whole story; beside a long table there is no room for a part of it
        tmux.keys("Enter")
        tmux.until(f"gfn {poison['gfn']:#x}")
        tmux.keys("q")
        tmux.until(f"looping +{page} ")

        # Help, sort, drill, filter
        tmux.keys("?")
        tmux.until("^  keys")
        tmux.keys("q")
        tmux.keys("v")
        tmux.until("Incidents .*by VM")
        tmux.keys("Enter")
        tmux.until("q back")
        tmux.keys("q", "Tab", "/")
        tmux.until("^filter: ")
        tmux.keys("well", "Enter")
        tmux.until("filter 'well'")
        tmux.until(r"\[VMs 1\]")
        tmux.keys("Escape")
        tmux.until("^sick +[0-9]")

        # A paused table does not change; it catches up when resumed
        tmux.keys("p")
        tmux.until("PAUSED")
        counted = re.search(r"sick +\d+ .*", tmux.screen())
        machine.run("sleep 3")
        again = re.search(r"sick +\d+ .*", tmux.screen())
        assert counted
        assert again
        assert counted[0] == again[0]
        tmux.keys("p")
        tmux.until(rf"(?s)\A(?!.*{re.escape(counted[0])}).*sick")

        # Resize, and quit
        tmux.job.resize(40, 120)
        tmux.keys("Tab", "Tab", "Tab", "Tab")  # round to the first
        tmux.until(f"looping +{page} ")
        tmux.until(r"\A(.*\n){39}.*q quit")
        tmux.keys("q")
        tmux.until("^status 0")
        tmux.until("shell:")
        assert tmux.modes() == before
        assert "Traceback" not in tmux.screen()
    finally:
        machine.run(f"{TMUX} kill-server")
        other.job.kill()


def test_printed_once(machine: Machine) -> None:
    """Text and JSON of events during the interval; both agree with the VMM."""
    vmm = Vmm(machine, "once")
    vmm.step("create v backing=gmem pages=32")
    vmm.step("touch v +3")
    once = "exec kvmtrace top --once --interval 1h --source ftrace"
    text, program = machine.start(once), machine.start(f"{once} --json")
    _until_they_wait(machine, 2)
    poison = vmm.step("poison v +3")
    vmm.step("loop v +3 50")
    machine.run("sleep 3")
    report = vmm.step("report")
    for job in (text, program):
        job.signal(signal.SIGINT)
        assert job.wait(PATIENCE) == 0, job.tail()
        assert job.stderr == ""
    vmm.end()

    assert sum(row["count"] for row in report["failed"]) == 50
    row = [x for x in text.stdout.splitlines() if x.startswith("once ")][-1]
    assert row.split()[1:4] == [str(vmm.pid), "vmm", "50"]
    assert re.search(rf"^looping +once +{poison['pfn']:x}-1 ", text.stdout, re.MULTILINE)
    assert "\x1b" not in text.stdout

    shown: Line = json.loads(program.stdout)
    assert program.stdout.count("\n") == 1
    (vm,) = [x for x in shown["vms"] if x["pid"] == vmm.pid]
    assert (vm["name"], vm["exits"], vm["causes"]) == ("once", {"EHWPOISON": 50}, {"hwpoison": 50})
    (incident,) = [x for x in shown["incidents"] if x.get("pfn") == poison["pfn"]]
    assert (incident["state"], incident["deliveries"]["exits"]) == ("looping", 50)
    assert [(x["vm"]["pid"], x["gfn"]) for x in incident["owners"]] == [(vmm.pid, poison["gfn"])]
    assert shown["host"]["source"] == "ftrace"
    assert not any(shown["lost"].values())


def _until_they_wait(machine: Machine, watchers: int) -> None:
    """Wait until that many kvmtraces sleep in poll with their rings open."""
    waiting = (
        f"until [ $(pgrep -cx kvmtrace) = {watchers} ]; do sleep 0.2; done; "
        "for p in $(pgrep -x kvmtrace); do"
        "  until ls -l /proc/$p/fd | grep -q trace_pipe_raw && grep -q poll /proc/$p/wchan;"
        "  do sleep 0.2; done; "
        "done"
    )
    machine.run(waiting, timeout=PATIENCE, check=True)
