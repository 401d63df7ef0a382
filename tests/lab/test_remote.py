"""Commands beside a running `kvmtrace serve`: they get its exact counts and attach no probes."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator

import pytest

from kvmtrace.local_socket import DIRECTORY
from kvmtrace.views.json_output import rfc3339
from tests.lab import leftovers, privileges
from tests.lab.harness import PATIENCE, Line, Vmm, Watch, end_following, metrics_of, start_serve
from tests.lab.machine import Job, Machine

pytestmark = pytest.mark.lab


@pytest.fixture(params=["bpf", "ftrace"])
def serve(request: pytest.FixtureRequest, machine: Machine) -> Iterator[Job]:
    end_following(machine)  # kvmtraces of other tests are attached as well
    before = leftovers.attached(machine)
    serve = start_serve(machine, f"--source {request.param}")
    privileges.assert_given_up(machine)
    yield serve
    if serve.poll() is None:
        serve.signal(signal.SIGINT)
        assert serve.wait(PATIENCE) == 0, serve.stderr
    leftovers.assert_only(machine, before)


def _metric(machine: Machine, serve: Job, name: str, *labels: str) -> float:
    """Value of the one series with that name and these labels."""
    (line,) = [
        line
        for line in metrics_of(machine, serve).splitlines()
        if line.startswith(f"{name}{{") and all(label in line for label in labels)
    ]
    return float(line.rpartition(" ")[2])


def _top(machine: Machine) -> Line:
    shown = machine.run("kvmtrace top --once --json", timeout=PATIENCE, check=True)
    return dict(json.loads(shown.stdout))


def _exits(shown: Line, name: str) -> int:
    return sum(sum(vm["exits"].values()) for vm in shown["vms"] if vm["name"] == name)


def test_all_that_happened_before_and_what_happens_then(machine: Machine, serve: Job) -> None:
    """A serve finds owners and detaches with the privileges that it has kept."""
    sick, shaken = Vmm(machine, "sick"), Vmm(machine, "shaken")
    sick.step("create v backing=gmem pages=32")
    shaken.step("create v backing=anon pages=32")
    for vmm in (sick, shaken):
        vmm.step("touch v +3")
    poison, other = sick.step("poison v +3"), shaken.step("poison v +3")
    sick.step("loop v +3 3000")
    shaken.step("loop v +3 200", may_fail=True)
    report = {vmm.name: vmm.step("report") for vmm in (sick, shaken)}
    returned = {name: sum(row["count"] for row in one["failed"]) for name, one in report.items()}
    assert returned["sick"] == 3000
    probing = leftovers.attached_probes(machine)
    modes = machine.run(f"stat -c '%a %U %F' {DIRECTORY} {DIRECTORY}/*", check=True).stdout
    assert modes == "750 root directory\n600 root socket\n"

    deadline = time.monotonic() + PATIENCE  # a serve reads the kernel's counts periodically
    while _exits(shown := _top(machine), "sick") < returned["sick"] and time.monotonic() < deadline:
        pass
    vms = {vm["name"]: vm for vm in shown["vms"]}
    assert vms["sick"]["exits"] == {"EHWPOISON": returned["sick"]}
    signals = sum(one["count"] for one in report["shaken"]["sigbus"] if one["code"] == "AR")
    assert vms["shaken"]["sigbus"]["AR"] == signals
    incidents = {one["pfn"]: one for one in shown["incidents"] if "pfn" in one}
    for page, vmm in ((poison, sick), (other, shaken)):
        (owner,) = incidents[page["pfn"]]["owners"]
        assert owner["vm"]["pid"] == vmm.pid
        # ftrace does not see every memslot
        assert owner.get("gfn", shown["host"]["source"]) in (page["gfn"], "ftrace")
    assert incidents[poison["pfn"]]["deliveries"] == {"exits": returned["sick"], "sigbus": 0}
    assert re.fullmatch(r"of kvmtrace serve, pid \d+", shown["host"]["source_why"])
    assert not any(shown["lost"].values())

    # Later events are complete, and /metrics and all views have the same counts
    watch = Watch(machine, "auto", "--vm sick")
    recording = machine.start("exec kvmtrace record /tmp/joined.jsonl --force")
    recording.wait_for("recording to", timeout=PATIENCE, stream="stderr")
    assert leftovers.attached_probes(machine) == probing
    sick.step("loop v +3 2000")
    watch.until(
        lambda lines: sum(x["count"] for x in lines if x["kind"] == "exit") >= 2000, "2000 exits"
    )
    assert sum(x["count"] for x in watch.lines("exit")) == 2000
    assert [x["state"] for x in watch.lines("vm")] == ["seen"]
    assert len(watch.lines("exit")) < 2000
    recording.signal(signal.SIGINT)
    assert recording.wait(PATIENCE) == 0
    replayed = machine.run("kvmtrace replay /tmp/joined.jsonl --json", check=True).stdout
    assert _exits(json.loads(replayed), "sick") == _exits(_top(machine), "sick") == 5000
    exits = "kvmtrace_memory_fault_exits_total"
    assert _metric(machine, serve, exits, 'vm="sick"', 'errno="EHWPOISON"') == 5000
    watch.end()

    _step_of_the_clock(machine, sick)

    # An explicit --source attaches its own probes
    shown = json.loads(
        machine.run(
            "kvmtrace top --once --json --source ftrace", timeout=PATIENCE, check=True
        ).stdout
    )
    assert shown["host"]["source_why"] == "asked for"
    for vmm in (sick, shaken):
        vmm.end()


def _step_of_the_clock(machine: Machine, vmm: Vmm) -> None:
    """Pages fail before, while and after the clock is a day ahead: their times of day are right."""
    file = "/tmp/clock.jsonl"
    recording = machine.start(f"exec kvmtrace record {file} --force")
    recording.wait_for("recording to", timeout=PATIENCE, stream="stderr")
    pfns = []
    try:
        for page, step in (("+4", "+1 day"), ("+5", "-1 day"), ("+6", "")):
            vmm.step(f"touch v {page}")
            pfns.append(vmm.step(f"poison v {page}")["pfn"])
            seen = f"""grep -q '"kind":"poison".*"pfn":{pfns[-1]},' {file}"""
            machine.run(f"until {seen}; do sleep 0.1; done", timeout=PATIENCE, check=True)
            machine.run(f"date -s 'now {step}'", check=True)
    finally:
        machine.run(f"date -s @{time.time()}", check=True)
    shown = _top(machine)
    recording.signal(signal.SIGINT)
    assert recording.wait(PATIENCE) == 0
    lines = machine.run(f"cat {file}", check=True).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    second = 1_000_000_000
    ts = {one["pfn"]: one["ts"] for one in records if one.get("kind") == "poison"}
    first, ahead, back = (ts[pfn] for pfn in pfns)
    assert first < ahead - 86400 * second < back < first + PATIENCE * second
    of_top = {one.get("pfn"): one.get("poisoned_ts") for one in shown["incidents"]}
    assert [of_top[pfn] for pfn in pfns] == [rfc3339(ts[pfn]) for pfn in pfns]
    steps = [one["step_ns"] for one in records if one.get("kind") == "clock"][:2]
    assert steps == pytest.approx([86400 * second, -86400 * second], abs=second)
    assert [one["step_ns"] for one in shown["clock_steps"]][:2] == steps


@pytest.mark.parametrize("serve", ["ftrace"], indirect=True)
def test_a_serve_that_restarts_under_a_live_top(machine: Machine, serve: Job) -> None:
    """`top` reports it, waits, goes on with the next one, and restores the terminal at its end."""
    env = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
    shell = machine.start(
        "before=$(stty -g); kvmtrace top; echo status $?; [ $(stty -g) = $before ] && echo same",
        pty=(24, 80),
        env=env,
    )
    shell.wait_for(r"\(of kvmtrace serve, pid", timeout=PATIENCE)
    serve.signal(signal.SIGTERM)
    assert serve.wait(PATIENCE) == 0
    assert machine.run(["ls", "-A", DIRECTORY], check=True).stdout == ""
    shell.wait_for(r"kvmtrace serve \(pid \d+\) has ended, \d+ s ago: waiting", timeout=PATIENCE)
    again = start_serve(machine, "--source ftrace")
    shell.wait_for(r"another kvmtrace serve \(pid \d+\) took over", timeout=PATIENCE)
    shell.send(b"q")
    assert shell.wait(PATIENCE) == 0
    again.signal(signal.SIGINT)
    assert again.wait(PATIENCE) == 0
    shown = shell.stdout.rpartition("\x1b[?1049l")[2]  # back from the alternate screen
    assert re.search(r"status 0\r\nsame", shown)
    assert "Traceback" not in shown
