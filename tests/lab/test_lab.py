"""The lab itself: what machines offer, and that they neither hang nor report a wrong status."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.lab.conftest import Boot, Shared
from tests.lab.errors import CommandFailed, LabError, LabPanic, LabTimeout
from tests.lab.harness import PATIENCE
from tests.lab.machine import Machine
from tests.lab.root import LIBRARY

pytestmark = pytest.mark.lab


def test_a_machine_has_kvm_bcc_and_nested_paging(machine: Machine) -> None:
    assert machine.run("uname -r").stdout.strip() == machine.release
    assert machine.run("hostname").stdout.strip() == "lab"
    assert machine.run("test -c /dev/kvm").status == 0
    assert machine.run("cat /sys/module/kvm_amd/parameters/npt").stdout.strip() in ("1", "Y")
    assert machine.run(["python3", "-c", "import bcc"], check=True).stderr == ""
    assert machine.run("ls /sys/kernel/debug/hwpoison/corrupt-pfn").status == 0
    assert machine.run("ls /sys/kernel/tracing/events/kvm", check=True).stdout


def test_status_and_both_outputs_are_passed_on(machine: Machine) -> None:
    result = machine.run("echo out; echo err >&2; exit 7")
    assert (result.status, result.stdout, result.stderr) == (7, "out\n", "err\n")
    assert machine.run("kill -KILL $$").status == -signal.SIGKILL
    assert machine.run(["no-such-program"]).status == 127
    with pytest.raises(CommandFailed, match="status 3: why"):
        machine.run("echo why >&2; exit 3", check=True)


def test_input_larger_than_a_pipe_comes_back_whole(machine: Machine) -> None:
    text = "0123456789abcde\n" * 40_000
    assert machine.run(["cat"], stdin=text).stdout == text


def test_a_program_that_does_not_read_its_input_blocks_nobody(machine: Machine) -> None:
    sleeper = machine.start("exec sleep 100")
    sleeper.send("x" * 1_000_000)
    assert machine.run("echo still here").stdout == "still here\n"
    sleeper.kill()
    assert sleeper.wait(10) == -signal.SIGKILL


def test_files_go_in_and_come_back(machine: Machine) -> None:
    (machine.share / "in").write_text("from the host")
    machine.run("cat /mnt/share/in > /mnt/share/out; rm /mnt/share/in", check=True)
    assert (machine.share / "out").read_text() == "from the host"
    assert not (machine.share / "in").exists()


def test_time_limit_is_honoured_and_the_program_killed(machine: Machine) -> None:
    start = time.monotonic()
    with pytest.raises(LabTimeout, match="sleep 54321"):
        machine.run("echo so far; sleep 54321", timeout=2)
    assert time.monotonic() - start < 5
    time.sleep(0.5)
    assert machine.run("pgrep -f 'sleep 5432[1]'").status == 1


def test_jobs_run_beside_each_other_and_take_signals(machine: Machine) -> None:
    echo = machine.start(["cat"])
    trap = machine.start("trap 'echo bye; exit 5' INT; echo ready; while :; do sleep 0.1; done")
    trap.wait_for("^ready$")
    echo.send("hello\n")
    assert echo.wait_for("hello") == "hello\n"
    assert trap.poll() is None
    trap.signal(signal.SIGINT)
    assert trap.wait(10) == 5
    assert trap.stdout == "ready\nbye\n"
    echo.close_stdin()
    assert echo.wait(10) == 0
    with pytest.raises(LabError, match="ended"):
        echo.wait_for("never", timeout=10)


def test_a_job_can_have_a_terminal_of_any_size(machine: Machine) -> None:
    job = machine.start("tty; stty size; read line; stty size", pty=(24, 80))
    job.wait_for("24 80")
    job.resize(40, 132)
    job.send("\n")
    assert job.wait(10) == 0
    assert "/dev/pts/" in job.stdout
    assert "40 132" in job.stdout


def test_modules_and_mounts_are_a_choice(boot: Boot) -> None:
    machine = boot(modules=(), mounts=("debugfs",), cmdline_extra="kvmtrace_lab_was_here")
    assert machine.run("test -e /dev/kvm").status == 1
    assert machine.run("mountpoint -q /sys/kernel/tracing").status != 0
    assert "kvmtrace_lab_was_here" in machine.run("cat /proc/cmdline").stdout
    machine.run("modprobe kvm-amd && test -c /dev/kvm", check=True)


def test_qemu_itself_can_be_asked(machine: Machine) -> None:
    assert machine.qmp("query-status")["return"]["running"] is True
    with pytest.raises(LabError, match="QMP no-such-command"):
        machine.qmp("no-such-command")


@pytest.fixture(scope="module")
def pair(shared_machine: Shared) -> Iterator[tuple[Machine, Machine]]:
    """Two machines that are booted at once, after the shared one. The last tests end them."""
    shared_machine.get()
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda _: Machine.boot(), range(2))
    with first, second:
        yield first, second


def test_two_machines_at_once(pair: tuple[Machine, Machine]) -> None:
    first, second = pair
    (first.share / "name").write_text("first")
    assert first.run("cat /mnt/share/name").stdout == "first"
    assert second.run("cat /mnt/share/name").status == 1


def test_what_one_machine_compiled_others_have(pair: tuple[Machine, Machine]) -> None:
    machine, _ = pair
    machine.run("touch /tmp/booted")
    assert "were kept already" in machine.run("kvmtrace compile", PATIENCE, check=True).stdout
    compiled = f"find {LIBRARY}/kvmtrace -name '*.pyc'"
    assert f"{LIBRARY}/kvmtrace/cli/" in machine.run(compiled, check=True).stdout
    assert machine.run(f"{compiled} -newer /tmp/booted", check=True).stdout == ""


def test_a_panic_is_reported_as_one(pair: tuple[Machine, Machine]) -> None:
    machine, _ = pair
    with pytest.raises(LabPanic, match="sysrq triggered crash"):
        machine.run("echo c > /proc/sysrq-trigger", timeout=30)
    assert not machine.alive


def test_a_machine_does_not_outlive_its_limit(pair: tuple[Machine, Machine]) -> None:
    _, machine = pair
    machine.limit(1)
    with pytest.raises(LabError, match="its 1 s are over"):
        machine.run("sleep 60", timeout=60)
