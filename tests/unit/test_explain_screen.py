"""`explain` without a target, of several VMs, of recordings of real kernels, and in colour."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.errors import UsageError
from kvmtrace.events import Event, Exit, Host, HwError, Owned, Owner, Poison, Sigbus, VmGone, VmSeen
from kvmtrace.judgement.urgency import Urgency, by_urgency, urgency_of
from kvmtrace.model import Incident, KernelAccount, Snapshot
from kvmtrace.probes import Probe
from kvmtrace.sources.recording import Writer
from kvmtrace.views import explain_screen, lookup
from kvmtrace.views.answer import answer, word
from kvmtrace.views.check import CheckState, check
from kvmtrace.views.explain import Showing
from kvmtrace.views.format import cells, plain
from tests.unit import snapshots
from tests.unit.command_line import invoke
from tests.unit.fake import PROBES, SECOND, T0

RECORDINGS = Path(__file__).parents[1] / "recordings"
STORY = str(RECORDINGS / "story.jsonl")
REAL = sorted((RECORDINGS / "scenarios").glob("lab-*.jsonl"))
LRU = "dirty LRU page"


def explained(*arguments: str) -> str:
    result = invoke("explain", *arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def words(text: str) -> str:
    return " ".join(text.split())


def recorded(path: Path, *events: Event) -> str:
    with path.open("w") as file:
        Writer(file, Host("sick", "6.18.15", "bpf")).write(events, PROBES[:1])
    return str(path)


# -- without a target


def test_all_that_is_open_worst_first() -> None:
    text = explained("--from", STORY)
    heads = re.findall(r"^([A-Z]{2,}) +(.*)$", text, re.MULTILINE)
    assert [head for head, _ in heads] == ["LOOPING", "STOPPED", "LATENT", "LOOPING", "STOPPED"]
    assert text.count("\nDo\n") == 2  # the latent one is not the night's work
    first, _, rest = text.partition("\nhv-fra1-07, Linux 6.18.15")
    assert "Stop and start the VM (4f2311-1)." in words(first)
    assert "guest yet. Shut down" in words(first)
    assert "The whole story of each other one: kvmtrace explain ID --from" in rest
    assert max(len(line) for line in text.splitlines() if "kvmtrace explain" not in line) == 80


def test_all_that_is_open_as_json() -> None:
    told = json.loads(explained("--from", STORY, "--json"))
    assert [one["urgency"] for one in told] == ["looping", "stopped", "latent"]
    assert told[0]["answer"] == "web-1 has been stuck on a poisoned page for 5 min."
    assert {"actions", "next", "timeline", "not_known"} <= told[0].keys()


def test_nothing_open_is_told_with_since_when_it_watches(tmp_path: Path) -> None:
    path = recorded(tmp_path / "quiet.jsonl", VmSeen(T0, 1, 4001, "web"), VmGone(T0 + SECOND, 1))
    text = words(explained("--from", path))
    assert text.startswith(
        "OK No poisoned page of a VM is known on sick,"
        " watching since 2026-09-21 14:13:20 UTC (1 s)."
    )
    assert "Not known" not in text
    assert json.loads(explained("--from", path, "--json")) == []


@pytest.mark.parametrize(
    "blind",
    [
        {"probes": (Probe("poison", False, why="gone"),)},
        {"kernel": KernelAccount({}, {}, 3, 1)},
        {"vms": {1: snapshots.vm(1, "web", poisoned_pages=2, forgotten_pages=2)}},
    ],
)
def test_what_may_have_gone_unseen_is_not_called_fine(blind: dict[str, object]) -> None:
    snapshot = replace(Snapshot(host=snapshots.HOST), **blind)  # type: ignore[arg-type]
    line, *_ = explain_screen.of_all(snapshot, Showing(now=snapshots.NOW))
    assert plain(line).startswith("UNCLEAR  No poisoned page of a VM is known")
    if "vms" in blind:
        target = lookup.find(snapshot, "web")
        line, *_ = explain_screen.of_target(target, snapshot, Showing(now=snapshots.NOW))
        assert plain(line).startswith("UNCLEAR  web had 2 poisoned pages of which no more is known")


def test_pages_of_the_kernel_that_were_forgotten_come_first() -> None:
    snapshot = replace(snapshots.small(), kernel_pages=2)
    first, *_ = explain_screen.of_all(snapshot, Showing(now=snapshots.NOW))
    assert plain(first).startswith("KERNEL  The host can go down at any time: its kernel may use")
    assert check(snapshot, snapshots.NOW, {}).state == CheckState.CRITICAL


def test_pages_of_no_vm_share_a_line(tmp_path: Path) -> None:
    poisons = [Poison(T0, pfn, "free buddy page", "Recovered") for pfn in range(0x100, 0x109)]
    text = words(explained("--from", recorded(tmp_path / "many.jsonl", *poisons)))
    assert text.startswith("UNOWNED 9 pages, the last one: A page was poisoned a moment ago;")
    assert "(100-1, 101-1, 102-1, …)" in text


# -- VMs


def test_a_vm_without_incidents_is_told_with_its_exits() -> None:
    text = explained("batch-1", "--from", STORY)
    assert "\nCan batch-1 be migrated now? Yes: no lost page of its memory is known.\n" in text
    assert "204 EFAULT: conversion between private and shared memory, normal in" in words(text)


def test_a_vm_that_lost_a_page_is_not_to_be_migrated() -> None:
    text = words(explained("db-1", "--from", STORY))
    assert "Can db-1 be migrated now? No: 1 page of its memory is lost (gfn 0x48a1): QEMU" in text


def sick(key: int, name: str, ts: int = T0) -> list[Event]:
    """A VM with a page that it has not touched."""
    return [
        VmSeen(ts, key, 4000 + key, name),
        Owned(ts, 0x100 + key, Owner(key, key, 0x7F0000000000), "pagemap"),
        Poison(ts, 0x100 + key, LRU, "Recovered"),
    ]


def test_several_vms_of_one_name_are_listed(tmp_path: Path) -> None:
    """Started again after the page was lost: the new one is fine, the old one is over."""
    events = [*sick(1, "web"), VmGone(T0 + SECOND, 1), VmSeen(T0 + 2 * SECOND, 2, 4002, "web")]
    text = explained("web", "--from", recorded(tmp_path / "again.jsonl", *events))
    assert text.startswith("OK  None of 2 VMs has a poisoned page as far as is known")
    assert "2 VMs go by that\n" in text
    assert "no page      web (pid 4002); can be migrated: yes\n" in text
    assert "closed       web (pid 4001), gone\n" in text
    assert "What is over\n  - 101-1: web, which had a page that was poisoned" in text


def test_a_part_of_several_names_lists_them(tmp_path: Path) -> None:
    events = [*sick(1, "node-17"), VmSeen(T0, 2, 4002, "node-171"), VmSeen(T0, 3, 4003, "node-1")]
    path = recorded(tmp_path / "nodes.jsonl", *events)
    text = explained("node", "--from", path)
    assert text.startswith("LATENT  node-17 has had a poisoned page")
    assert "Read as a part of node-17, node-171, node-1.\n" in text
    assert "3 VMs go by that\n  latent       node-17 (pid 4001)" in text
    number = words(explained("17", "--from", path))
    assert "Read as a part of node-17; pfn 0x11 is not known to be poisoned." in number
    assert "node-171" not in number


def test_what_begins_an_id_and_is_a_part_of_a_name_is_neither(tmp_path: Path) -> None:
    events = [VmSeen(T0, 1, 4001, "db-1"), Poison(T0, 0xDB00, "free buddy page", "Recovered")]
    path = recorded(tmp_path / "db.jsonl", *events)
    result = invoke("explain", "db", "--from", path)
    assert result.exit_code == 2
    assert "db is the beginning of db00-1, and a part of db-1" in result.stderr
    assert "(incident db00-1)" in explained("db00", "--from", path)


def test_an_address_that_is_lost_as_gpa_and_as_gfn(tmp_path: Path) -> None:
    events: list[Event] = [VmSeen(T0, 1, 4001, "web")]
    for pfn, gfn in ((0x100, 8), (0x101, 0x8000)):
        events += [Owned(T0, pfn, Owner(1, gfn), "pagemap"), Poison(T0, pfn, LRU, "Recovered")]
    text = words(explained("0x8000@web", "--from", recorded(tmp_path / "both.jsonl", *events)))
    assert (
        "Read as gpa 0x8000 (gfn 0x8) of web: 100-1; and as gfn 0x8000 (gpa 0x8000000): 101-1."
        in text
    )


def test_a_dimm_with_errors_and_a_vm_of_its_name(tmp_path: Path) -> None:
    error = HwError(T0, "GHES", "corrected", 0x59040, 0x59, 64, 3, "A1")
    path = recorded(tmp_path / "dimm.jsonl", error, VmSeen(T0, 1, 4001, "a1"))
    result = invoke("explain", "a1", "--from", path)
    assert (result.exit_code, "a1 is a DIMM and a VM" in result.stderr) == (2, True)
    assert "hint: name 'DIMM A1', or the VM 'pid 4001'" in result.stderr
    for target in ("DIMM A1", "dimm a1", "A1"):
        assert "A1: 3 errors reported (3 corrected)" in explained(target, "--from", path) or (
            target == "A1"
        )


# Pieces of what can be named, and of what cannot.
TARGETS = st.lists(
    st.sampled_from(["web", "-1", "0x", "@", "103275", "44", "9" * 5000, "f" * 5000, " ", "pid "])
    | st.text(max_size=4),
    max_size=5,
).map("".join)


@given(TARGETS)
def test_whatever_is_named_is_explained_or_refused(target: str) -> None:
    """On a screen whose lines fit, or with the one error that names what there is."""
    snapshot = snapshots.small()
    try:
        found = lookup.find(snapshot, target)
    except UsageError:
        return
    lines = [*explain_screen.of_target(found, snapshot, Showing(now=snapshots.NOW))]
    commands = ("title", "head")
    prose = [line for line in lines if line and line[-1][1] not in commands]
    assert all(cells(plain(line)) <= 80 for line in prose)


# -- the answer


def incident_of(urgency: Urgency) -> Incident:
    found = {urgency_of(one): one for one in by_urgency(snapshots.small().incidents)}
    return found[urgency]


@pytest.mark.parametrize(
    ("urgency", "said"),
    [
        (Urgency.LOOPING, "web-1 has been stuck on a poisoned page for 59 s."),
        (Urgency.LATENT, "web-1 has had a poisoned page for 30 s, not touched by its guest yet."),
    ],
)
def test_the_answer_names_who_what_and_how_long(urgency: Urgency, said: str) -> None:
    assert answer(incident_of(urgency), snapshots.small(), snapshots.NOW) == said
    assert word(urgency) == urgency.value.upper()


def test_a_vm_that_was_notified_ahead(tmp_path: Path) -> None:
    events = [*sick(1, "web"), Sigbus(T0 + 1, 4001, 4001, 5, 0x7F0000000000, 12, 4001, vm=1)]
    text = words(explained("--from", recorded(tmp_path / "ahead.jsonl", *events)))
    assert "was notified of a poisoned page a moment ago, before any guest touched it;" in text


def test_names_are_told_apart_and_counted(tmp_path: Path) -> None:
    events: list[Event] = []
    for key, name in enumerate(("a", "b", "c"), 1):
        owned = Owned(T0, 0x100, Owner(key, key), "pagemap")
        events += [VmSeen(T0, key, 4000 + key, name), owned]
    path = recorded(tmp_path / "shared.jsonl", *events, Poison(T0, 0x100, LRU, "Recovered"))
    assert explained("--from", path).startswith("LATENT  a and 2 more VMs have had a poisoned page")


# -- the timeline


def test_a_story_of_two_days_has_both_dates(tmp_path: Path) -> None:
    night = T0 + 35140 * SECOND  # 23:59:00
    events: list[Event] = [
        VmSeen(night, 1, 4001, "web"),
        Owned(night, 0x100, Owner(1, 8), "pagemap"),
        Poison(night, 0x100, LRU, "Failed"),
        Exit(night + 100 * SECOND, 1, 0, 133, 39, True, 77, gpa=0x8000, gfn=8),
        Exit(night + 4000 * SECOND, 1, 0, 133, 39, True, 77, gpa=0x8000, gfn=8),
    ]
    text = explained("web", "--from", recorded(tmp_path / "night.jsonl", *events))
    assert "\nWhat happened (2026-09-21, UTC)\n  23:" in text
    assert "\n  2026-09-22\n  00:" in text


def test_times_are_local_with_their_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "TZ": "Europe/Berlin"}
    command = [sys.executable, "-m", "kvmtrace", "explain", "web-1", "--from", STORY]

    def shown(*options: str) -> str:
        done = subprocess.run(
            [*command, *options], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert "\nas of 2026-09-21 17:56:50 UTC+02:00\n" in shown()
    assert "\nWhat happened (2026-09-21, UTC+02:00)\n  16:14:20  corrected" in shown()
    assert "\nas of 2026-09-21 15:56:50 UTC\n" in shown("--utc")


# -- real kernels, and terminals


@pytest.mark.parametrize("recording", REAL, ids=lambda path: path.stem)
def test_recordings_of_real_kernels(recording: Path) -> None:
    """Each VM, page and incident of them is explained, in 80 columns."""
    model = json.loads(invoke("replay", str(recording), "--json").stdout)
    targets = [one["id"] for one in model["incidents"]]
    targets += [f"pid {one['pid']}" for one in model["vms"]]
    targets += [str(one["pfn"]) for one in model["incidents"] if "pfn" in one]
    for target in [[], *([one] for one in targets)]:
        text = explained(*target, "--from", str(recording))
        assert re.match("(OK|UNCLEAR|[A-Z]+) +", text)
        assert model["host"]["kernel"] in text
        lines = [line for line in text.splitlines() if "kvmtrace explain" not in line]
        assert max(map(cells, lines)) <= 80
        told = json.loads(explained(*target, "--from", str(recording), "--json"))
        assert all(one["answer"] and one["actions"] for one in told)


def on_a_terminal(columns: int, **environment: str) -> str:
    """Return what `explain` prints of the story on a terminal of that width."""
    command = f"stty cols {columns}; exec {sys.executable} -m kvmtrace explain web-1 --from {STORY}"
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
    pid, terminal = pty.fork()
    if pid == 0:
        # Not os.environ: pytest's readline has put COLUMNS where only execv finds it.
        ours = {"TERM": "xterm-256color", "TZ": "UTC"}
        os.execvpe("sh", ["sh", "-c", command], kept | ours | environment)
    read = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # EIO: the other end is closed
            break
        if not data:
            break
        read += data
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0, read
    return read.decode().replace("\r\n", "\n")


def test_colour_on_a_terminal_only() -> None:
    coloured = on_a_terminal(80)
    assert coloured.startswith("\x1b[31m\x1b[1mLOOPING\x1b[0m")
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == on_a_terminal(80, NO_COLOR="1")
    assert "\x1b" not in on_a_terminal(80, NO_COLOR="1")
    assert "\x1b" not in on_a_terminal(80, TERM="dumb")
    assert "\x1b" not in explained("web-1", "--from", STORY)


def test_a_narrow_terminal_has_narrow_lines() -> None:
    lines = on_a_terminal(40, NO_COLOR="1").splitlines()
    commands = ("kvmtrace explain", "virsh")
    assert [
        line
        for line in lines
        if cells(line) > 40 and not any(command in line for command in commands)
    ] == []
