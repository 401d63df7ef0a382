"""The same mishaps to a service on a host that systemd boots, in storms of real events.

A VM of the lab has its memory poisoned, page by page, and enters the guest at poisoned pages again
and again. What it was notified of is what its VMM counted; what was kept is what the history has.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvmtrace.events import Exit, Poison, VmGone, VmSeen
from tests.lab.errors import LabError
from tests.lab.harness import Vmm
from tests.lab.installed_host import InstalledHost
from tests.lab.progress import print_status
from tests.lab.service_host import RELEASES, Disk
from tests.survival import cases

KILLS = 5
HISTORY = "/var/lib/kvmtrace/history.db"

_PAGES = 48  # poisoned in the beginning of a storm
_EACH = 50  # exits of a step
_HEAD = (
    "what happened",
    "exits",
    "kept",
    "counted as lost",
    "neither",
    "pages poisoned",
    "kept",
    "file whole",
    "",
)


@dataclass(frozen=True)
class Notified:
    """What a VMM was notified of: how many exits, and the pages that were poisoned."""

    exits: int
    pages: frozenset[int]


@dataclass(frozen=True)
class Result:
    """What became of that. ``counted``: what serve counts as lost."""

    happened: Notified
    exits: int
    pages: int
    counted: int
    is_whole: bool

    @property
    def missing(self) -> int:
        """Exits that are neither kept nor counted."""
        return self.happened.exits - self.exits - self.counted


class Storm:
    """A VM in a storm, from now until ``end``."""

    def __init__(self, host: InstalledHost, name: str) -> None:
        self.vmm = Vmm(host.machine, name)
        self.vmm.step(f"create v backing={host.release.backing} pages={_PAGES}")
        self.answered = 0
        """Exits of the steps that were answered."""
        self._pages: set[int] = set()
        self._failure: BaseException | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"storm-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        try:
            while not self._is_over.is_set():
                page = f"+{number % _PAGES}"
                if number < _PAGES:
                    self.vmm.step(f"touch v {page}")
                    self._pages.add(int(self.vmm.step(f"poison v {page}")["pfn"]))
                self.vmm.step(f"loop v {page} {_EACH}")
                self.answered += _EACH
                number += 1
        except (LabError, AssertionError) as failure:
            self._failure = failure

    def wait_for(self, exits: int) -> None:
        """Let it go on for so many exits."""
        end = self.answered + exits
        while self.answered < end:
            if self._failure is not None:
                raise self._failure
            time.sleep(0.05)

    def end(self) -> Notified:
        """End the VM; what it was notified of."""
        self._is_over.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        failed = self.vmm.end()["failed"]
        assert {row["errno"] for row in failed} == {"EHWPOISON"}, failed
        return Notified(sum(row["count"] for row in failed), frozenset(self._pages))

    def pause(self) -> Notified:
        """What it was notified of until now, after which nothing happens to it."""
        self._is_over.set()
        self._thread.join()
        return Notified(self.answered, frozenset(self._pages))


_COPY = f"""
import sqlite3
database = sqlite3.connect("file:{HISTORY}?mode=ro", uri=True)
print(database.execute("PRAGMA integrity_check").fetchone()[0])
database.execute("VACUUM INTO '/tmp/copy.db'")
"""


@dataclass
class _Kept:
    """What the history has of a VM."""

    exits: int = 0
    pages: set[int] = field(default_factory=set)
    is_gone: bool = False
    is_whole: bool = False


def _kept(host: InstalledHost, name: str) -> _Kept:
    done = host.machine.run(["python3", "-c", _COPY], check=True)
    host.run("mv /tmp/copy.db /mnt/share/copy.db")
    copy = host.machine.share / "copy.db"
    found = _Kept(is_whole=done.stdout.strip() == "ok")
    keys = set()
    for event in cases.kept(str(copy)):
        match event:
            case VmSeen() if event.name == name:
                keys.add(event.vm)
            case VmGone() if event.vm in keys:
                found.is_gone = True
            case Exit() if event.vm in keys:
                found.exits += event.count
            case Poison():
                found.pages.add(event.pfn)
    copy.unlink()
    return found


def _result(host: InstalledHost, name: str, happened: Notified, kept: _Kept) -> Result:
    lost = json.loads(host.run("kvmtrace top --once --json"))["lost"]
    pages = len(happened.pages & kept.pages)
    result = Result(happened, kept.exits, pages, sum(lost.values()), kept.is_whole)
    print_status(f"survival: {name}: {result.missing} of {happened.exits} exits; {lost}")
    assert result.missing >= 0, result
    return result


def _settled(host: InstalledHost, name: str, happened: Notified) -> Result:
    """What became of it, once the end of the VM is kept."""

    def ended() -> _Kept | None:
        kept = _kept(host, name)
        return kept if kept.is_gone else None

    return _result(host, name, happened, host.until(ended, f"the end of {name}"))


def _restarts(host: InstalledHost) -> int:
    return int(host.property("NRestarts"))


def killed(host: InstalledHost, number: int, rng: random.Random) -> Result:
    """``kill -9`` at a random moment. The VM is stopped until the service is back."""
    name = f"kill-{number}"
    storm = Storm(host, name)
    storm.wait_for(rng.randrange(_EACH, 50 * _EACH))
    restarts = _restarts(host)
    pid = host.property("MainPID")
    host.run(f"kill -STOP {storm.vmm.pid} && kill -KILL {pid}")
    host.until_restarted(restarts + 1)
    host.run(f"kill -CONT {storm.vmm.pid}")
    storm.wait_for(10 * _EACH)
    return _settled(host, name, storm.end())


@contextlib.contextmanager
def _small_disk(host: InstalledHost) -> Iterator[str]:
    """The state directory is a file system of 4 MiB; yield it."""
    place = str(Path(HISTORY).parent)
    small = f"mount -t tmpfs -o size=4m,mode=750 tmpfs {place}"
    host.run(f"systemctl stop kvmtrace && {small} && systemctl start kvmtrace")
    try:
        yield place
    finally:
        host.run(f"systemctl stop kvmtrace && umount {place} && systemctl start kvmtrace")


def disk_full(host: InstalledHost, rng: random.Random) -> Result:
    """Another file fills up the disk in a storm, and is removed later."""
    with _small_disk(host) as place:
        storm = Storm(host, "full")
        storm.wait_for(rng.randrange(10, 30) * _EACH)
        host.run(f"dd if=/dev/zero of={place}/other bs=4k 2>/dev/null || true")
        _until_said(host, "cannot be written")
        storm.wait_for(60 * _EACH)
        metrics = "curl -s --unix-socket /run/kvmtrace/kvmtrace.sock http://localhost/metrics"
        shown = host.run(f"{metrics} | grep ^kvmtrace_history")
        assert "kvmtrace_history_writable 0" in shown, shown
        host.run(f"rm {place}/other")
        _until_said(host, "is written again")
        return _settled(host, "full", storm.end())


def _until_said(host: InstalledHost, what: str) -> str:
    """Wait for a line of the service's log; return the last one of them."""

    def said() -> str:
        return host.machine.run(f"journalctl -u kvmtrace -o cat | grep '{what}'").stdout

    return str(host.until(said, what)).splitlines()[-1]


_DAMAGE = f"""
import os, random
with open("{HISTORY}", "r+b") as file:
    pages = os.fstat(file.fileno()).st_size >> 12
    for page in (3, *random.Random(SEED).sample(range(4, pages), 5)):
        file.seek(page << 12)
        file.write(os.urandom(4096))
"""


def damaged(host: InstalledHost, rng: random.Random) -> Result:
    """Pages of the file are garbage when the service starts; the VM is there all the time."""
    storm = Storm(host, "damage")
    storm.wait_for(20 * _EACH)
    host.run(f"kill -STOP {storm.vmm.pid} && systemctl stop kvmtrace")
    script = _DAMAGE.replace("SEED", str(rng.randrange(1 << 30)))
    host.machine.run(["python3", "-c", script], check=True)
    host.run(f"systemctl start kvmtrace && kill -CONT {storm.vmm.pid}")
    aside = _until_said(host, "history.db.damaged").rpartition(" ")[2]
    host.run(f"test -s {aside}")
    storm.wait_for(20 * _EACH)
    return _settled(host, "damage", storm.end())


def stepped(host: InstalledHost, seconds: int) -> Result:
    """The host's clock is stepped in a storm, and back afterwards."""
    name = f"step{seconds:+d}"
    restarts = _restarts(host)
    storm = Storm(host, name)
    storm.wait_for(20 * _EACH)
    step = "date -s @$(( $(date +%s) + ({}) ))"
    host.run(step.format(seconds))
    storm.wait_for(20 * _EACH)
    result = _settled(host, name, storm.end())
    host.run(step.format(-seconds))
    assert _restarts(host) == restarts
    return result


def power_cut(host: InstalledHost, rng: random.Random) -> Result:
    """The machine ends right after a storm, whatever it does; its disk is booted again."""
    name = "cut"
    storm = Storm(host, name)
    storm.wait_for(rng.randrange(20, 60) * _EACH)
    happened = storm.pause()
    with contextlib.suppress(LabError):
        host.machine.qmp("quit")
    host.machine.close()
    host.boot_again()
    host.until(lambda: host.property("ActiveState") == "active", "active after the boot")
    shown = json.loads(host.run("kvmtrace top --once --json"))
    assert {one["urgency"] for one in shown["incidents"]} == {"closed"}
    return _result(host, name, happened, _kept(host, name))


def _row(what: str, found: list[Result], remark: str = "") -> str:
    missing = sorted({one.missing for one in found})
    neither = f"{missing[0]:,}" + (f" to {missing[-1]:,}" if len(missing) > 1 else "")
    numbers = [
        sum(one.happened.exits for one in found),
        sum(one.exits for one in found),
        sum(one.counted for one in found),
    ]
    pages = [sum(len(one.happened.pages) for one in found), sum(one.pages for one in found)]
    whole = "yes" if all(one.is_whole for one in found) else "NO"
    cells = [what, *(f"{one:,}" for one in numbers), neither, *(f"{one:,}" for one in pages), whole]
    return f"| {' | '.join([*cells, remark])} |"


def measure(directory: Path, rng: random.Random, kills: int = KILLS) -> list[str]:
    """Boot a host and do all of it there; lines in Markdown.

    Raises LabError, and AssertionError where something is not as it is stated.
    """
    disk = Disk.new(directory / "disk.img", "has_journal")
    host = InstalledHost(directory, RELEASES["trixie"], disk)
    rows = []

    def add(what: str, case: Callable[[], list[Result]], remark: str = "") -> None:
        print_status(f"survival: {what}")
        rows.append(_row(what, case(), remark))
        print_status(rows[-1])

    try:
        host.run("modprobe kvm-amd")
        host.install()
        add(
            f"`kill -9`, at {kills} random moments of a storm",
            lambda: [killed(host, number, rng) for number in range(kills)],
            "of what was not written yet",
        )
        add("disk full", lambda: [disk_full(host, rng)], "written when there is room")
        add(
            "file damaged",
            lambda: [damaged(host, rng)],
            "in the file that is set aside, which is said",
        )
        add("clock stepped an hour forwards", lambda: [stepped(host, 3600)])
        add("clock stepped an hour backwards", lambda: [stepped(host, -3600)])
        add(
            "power cut",
            lambda: [power_cut(host, rng)],
            "of what was not written yet",
        )
        kernel = host.run("uname -r").strip()
        sqlite = host.run("python3 -c 'import sqlite3; print(sqlite3.sqlite_version)'").strip()
    finally:
        host.machine.close()
    return [
        f"Measured {time.strftime('%Y-%m-%d', time.gmtime())}, under emulation (QEMU TCG):"
        f" Debian 13, Linux {kernel}, SQLite {sqlite}.",
        "",
        f"| {' | '.join(_HEAD)} |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
