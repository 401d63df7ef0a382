"""Run the lab's VMM and kvmtrace in a machine, and compare what the two report."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tests.lab.machine import Job, Machine, Result

Line = dict[str, Any]

PATIENCE = 300.0  # seconds; generous, as emulation on a shared machine is slow


class Vmm:
    """A VMM process that is sent one step after the other."""

    def __init__(self, machine: Machine, name: str = "vm", *, program: str = "vmm") -> None:
        self.name = name
        self.job: Job = machine.start(f"exec {program} --name {name}")
        self._answers = 0
        self.pid = int(self.step("pid")["pid"])

    def step(self, text: str, *, may_fail: bool = False, patience: float = PATIENCE) -> Line:
        """Send a step and return the answer. AssertionError if it failed, unless ``may_fail``."""
        self.begin(text)
        return self.finish(text, may_fail=may_fail, patience=patience)

    def begin(self, text: str) -> None:
        """Send a step; ``finish`` has to be called before the next one."""
        self.job.send(text + "\n")
        self._answers += 1

    def finish(self, text: str, *, may_fail: bool = False, patience: float = PATIENCE) -> Line:
        """Return the answer to a step sent by ``begin``; see ``step``."""
        answer = self._answer(patience)
        if "error" in answer and not may_fail:
            if answer.get("unsupported"):
                raise Unstageable(answer["error"])
            raise AssertionError(f"{text}: {answer}")
        return answer

    def end(self) -> Line:
        """Close stdin, wait for the end of the process and return its final report."""
        self.job.close_stdin()
        self._answers += 1
        report = self._answer(PATIENCE)
        assert self.job.wait(PATIENCE) == 0
        return report

    def _answer(self, patience: float) -> Line:
        deadline = time.monotonic() + patience
        while True:
            lines = self.job.stdout.splitlines(keepends=True)
            if len(lines) >= self._answers and lines[self._answers - 1].endswith("\n"):
                return dict(json.loads(lines[self._answers - 1]))
            if self.job.poll() is not None and len(lines) < self._answers:
                raise AssertionError(f"vmm {self.name} ended: {self.job.poll()} {self.job.stderr}")
            if time.monotonic() > deadline:
                raise AssertionError(f"no answer from vmm {self.name} in {patience:.0f} s")
            time.sleep(0.02)


class Unstageable(Exception):
    """This kernel or machine cannot stage a scenario; the text is the reason."""


def _with_mounts(change: str, command: str) -> str:
    """Build a command that runs in a mount namespace of its own, after ``change``."""
    return f"exec unshare -m sh -c {shlex.quote(f'{change} && exec {command}')}"


def kvmtrace(
    machine: Machine, command: str, env: dict[str, str] | None = None, *, mount_change: str = ""
) -> Result:
    """Run kvmtrace to its end. ``mount_change``: shell that changes mounts for it only."""
    command = f"kvmtrace {command}"
    line = _with_mounts(mount_change, command) if mount_change else f"exec {command}"
    return machine.run(line, timeout=PATIENCE, env=env)


def assert_refused(result: Result, message: str, hint: str = "") -> None:
    """Fail unless status is 1, stderr has a matching line and at most a hint, stdout nothing."""
    assert result.status == 1, result
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert 1 <= len(lines) <= 2, lines
    assert re.search(message, lines[0]), lines
    assert lines[0].startswith("kvmtrace: ")
    if hint:
        assert re.search(f"^hint: .*{hint}", lines[-1]), lines


class Watch:
    """An attached ``kvmtrace events --json``; with ``job``, the lines of a running one from now on.

    ``mount_change``: a shell command that changes mounts for this kvmtrace only.
    """

    def __init__(
        self,
        machine: Machine,
        source: str,
        extra: str = "",
        *,
        job: Job | None = None,
        mount_change: str = "",
    ) -> None:
        self.source = source
        command = f"kvmtrace events --json --source {source} {extra}"
        line = _with_mounts(mount_change, command) if mount_change else f"exec {command}"
        self.job = job or machine.start(line)
        self.job.wait_for(r"kvmtrace: watching", timeout=PATIENCE, stream="stderr")
        self._begin = len(self._text()) if job else 0

    def _text(self) -> str:
        text = self.job.stdout
        return text[: text.rfind("\n") + 1]

    def not_attached(self) -> list[str]:
        """Names of the probes that kvmtrace reports as not attached."""
        found = re.search(
            r"kvmtrace: watching .* not attached: (.*)$", self.job.stderr, re.MULTILINE
        )
        return found[1].split(", ") if found else []

    def lines(self, kind: str | None = None) -> list[Line]:
        """Complete lines since this watch began, of one kind or all."""
        lines = [json.loads(line) for line in self._text()[self._begin :].splitlines()]
        return [line for line in lines if kind in (None, line["kind"])]

    def until(
        self, condition: Callable[[list[Line]], object], what: str, patience: float = PATIENCE
    ) -> list[Line]:
        """Wait until the lines fulfil ``condition``; return them all."""
        deadline = time.monotonic() + patience
        while True:
            lines = self.lines()
            if condition(lines):
                return lines
            if time.monotonic() > deadline or self.job.poll() is not None:
                seen = "\n".join(json.dumps(line) for line in lines[-30:])
                raise AssertionError(f"never seen: {what}\n{seen}\n{self.job.stderr}")
            time.sleep(0.1)

    def end(self) -> list[Line]:
        """Stop kvmtrace by SIGINT; return everything that it reported."""
        self.job.signal(signal.SIGINT)
        status = self.job.wait(PATIENCE)
        assert status == 0, (status, self.job.stderr)
        assert "Traceback" not in self.job.stderr, self.job.stderr
        return self.lines()


@contextlib.contextmanager
def watching(
    machine: Machine, source: str, extra: str = "", *, mount_change: str = ""
) -> Iterator[Watch]:
    """Run a kvmtrace during the block; it is ended even if the block raises."""
    watch = Watch(machine, source, extra, mount_change=mount_change)
    try:
        yield watch
    finally:
        if watch.job.poll() is None:
            watch.job.signal(signal.SIGINT)
            watch.job.wait(PATIENCE)


_followed: weakref.WeakKeyDictionary[Machine, dict[str, Watch]] = weakref.WeakKeyDictionary()


def can_inject_poison(machine: Machine) -> bool:
    """Whether hwpoison-inject is there: it poisons any page by pfn."""
    return machine.run("test -e /sys/kernel/debug/hwpoison/corrupt-pfn").status == 0


@contextlib.contextmanager
def following(machine: Machine, *sources: str) -> Iterator[list[Watch]]:
    """Watch what kvmtrace reports by each of these sources from now on.

    It keeps running for the next scenario, as starting it takes longer than most scenarios.
    kvmtraces by other sources are ended first.
    """
    followed = _followed.setdefault(machine, {})
    for source in [s for s in followed if s not in sources]:
        followed.pop(source).end()
    for source in sources:
        if source not in followed or followed[source].job.poll() is not None:
            followed[source] = Watch(machine, source)
    watches = [Watch(machine, source, job=followed[source].job) for source in sources]
    yield watches
    for watch in watches:
        assert watch.job.poll() is None, (watch.job.poll(), watch.job.stderr)


def followed_jobs(machine: Machine) -> list[Job]:
    """The kvmtraces that ``following`` keeps running."""
    return [watch.job for watch in _followed.get(machine, {}).values()]


def end_following(machine: Machine) -> None:
    """End the kvmtraces that ``following`` started; AssertionError if one fails."""
    for watch in _followed.pop(machine, {}).values():
        watch.end()


def start_serve(machine: Machine, options: str = "") -> Job:
    """Start ``kvmtrace serve`` on a free port and wait until it serves."""
    job = machine.start(f"exec kvmtrace serve --listen 127.0.0.1:0 {options}")
    job.wait_for("serving http", timeout=PATIENCE, stream="stderr")
    return job


@contextlib.contextmanager
def serving(machine: Machine, options: str = "") -> Iterator[Job]:
    """Run ``kvmtrace serve`` during the block; AssertionError if it then fails."""
    serve = start_serve(machine, options)
    try:
        yield serve
    finally:
        serve.signal(signal.SIGINT)
        assert serve.wait(PATIENCE) == 0, serve.stderr


def metrics_of(machine: Machine, serve: Job) -> str:
    """The text of /metrics of a running serve."""
    return pages_of(machine, serve, "metrics")[0]


# Prints what the addresses have, as JSON.
_FETCH = """
import json, sys, urllib.request
print(json.dumps([urllib.request.urlopen(one).read().decode() for one in sys.argv[1:]]))
"""


def pages_of(machine: Machine, serve: Job, *paths: str) -> list[str]:
    """What a running serve has at these paths; "" is its landing page."""
    root = serve.stderr.partition("serving ")[2].split()[0].removesuffix("metrics")
    words = ["python3", "-c", _FETCH, *(root + path for path in paths)]
    return list(json.loads(machine.run(words, timeout=PATIENCE, check=True).stdout))


@contextlib.contextmanager
def recorded(machine: Machine, source: str, log: str = "") -> Iterator[str]:
    """Record during the block into ``log`` (default: a file of the source); yield its path."""
    log = log or f"/tmp/{source}.jsonl"
    job = machine.start(f"exec kvmtrace record {log} --force --source {source}")
    job.wait_for(r"recording to", timeout=PATIENCE, stream="stderr")
    try:
        yield log
        time.sleep(1)
    finally:
        job.signal(signal.SIGINT)
        assert job.wait(PATIENCE) == 0, job.stderr


def replayed(machine: Machine, log: str) -> Line:
    """The model of a recording: ``kvmtrace replay --json``."""
    shown = machine.run(["kvmtrace", "replay", log, "--json"], timeout=PATIENCE, check=True)
    return dict(json.loads(shown.stdout))


def replayed_lines(machine: Machine, log: str) -> list[Line]:
    """The event lines of a recording."""
    command = ["kvmtrace", "replay", log, "--events", "--json"]
    shown = machine.run(command, timeout=PATIENCE, check=True)
    return [json.loads(line) for line in shown.stdout.splitlines()]


ExitCounts = Counter[tuple[Any, ...]]
"""{(pid, vcpu, errno, reason, annotated, gpa, flags, size): exits}"""


def exits_returned(report: Line) -> ExitCounts:
    """Count what KVM_RUN returned, by the VMM's report: the truth."""
    returned: ExitCounts = Counter()
    for row in report["failed"]:
        returned[
            (
                report["pid"],
                row["vcpu"],
                row["errno"],
                row["reason"],
                row["annotated"],
                row.get("gpa"),
                row.get("flags"),
                row.get("size"),
            )
        ] += row["count"]
    return returned


def exits_reported(lines: list[Line], *pids: int) -> ExitCounts:
    """Count the exits of these processes that kvmtrace reported."""
    reported: ExitCounts = Counter()
    for line in lines:
        if line["kind"] == "exit" and line["vm"]["pid"] in pids:
            reported[
                (
                    line["vm"]["pid"],
                    line["vcpu"],
                    line["errno"],
                    line["reason"],
                    line["annotated"],
                    line.get("gpa"),
                    line.get("flags"),
                    line.get("size"),
                )
            ] += line["count"]
    return reported


def top(machine: Machine, source: str, interval: float = 1) -> Line:
    """``kvmtrace top --once --json``."""
    result = machine.run(
        f"kvmtrace top --once --json --interval {interval} --source {source}",
        timeout=PATIENCE,
        check=True,
    )
    return dict(json.loads(result.stdout))
