"""`kvmtrace check`: one line and a status, as monitors expect of a plugin."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvmtrace.events import Event, Host, Lost, Owned, Owner, Poison, Unpoison, VmSeen
from kvmtrace.model import Snapshot
from kvmtrace.probes import Probe
from kvmtrace.sources.recording import Writer
from kvmtrace.views.check import CheckState, check, unknown
from tests.unit import snapshots
from tests.unit.command_line import invoke
from tests.unit.fake import SECOND, T0
from tests.unit.test_remote import Serve, serve

__all__ = ["serve"]  # a fixture

STORY = str(Path(__file__).parents[1] / "recordings/story.jsonl")
ATTACHED = (Probe("poison", True), Probe("run", True))
HOUR = 3600 * SECOND
WEB: tuple[Event, ...] = (
    VmSeen(T0, 1, 4001, "web"),
    Owned(T0, 0x100, Owner(1, 8), "pagemap"),
    Poison(T0, 0x100, "dirty LRU page", "Recovered"),
)

# Monitoring Plugins Development Guidelines, "Plugin Output" and "Performance data".
PLUGIN = re.compile(r"KVMTRACE (OK|WARNING|CRITICAL|UNKNOWN) - [^|\n]+( \|( [a-z_]+=[0-9]+c?)+)?\n")


def checked(
    tmp_path: Path, *events: Event, probes: tuple[Probe, ...] = ATTACHED
) -> tuple[int, str]:
    path = tmp_path / "log.jsonl"
    with path.open("w") as file:
        Writer(file, Host("sick", "6.18.15", "bpf")).write(events, probes)
    result = invoke("check", "--from", str(path))
    assert PLUGIN.fullmatch(result.stdout), result.stdout
    assert result.stderr == ""
    return result.exit_code, result.stdout


@pytest.mark.parametrize(
    ("events", "status", "said"),
    [
        ((VmSeen(T0, 1, 4001, "web"),), 0, "OK - no poisoned page of a VM is known, watching for"),
        (WEB, 1, "WARNING - latent: web has had a poisoned page for a moment, not touched by"),
        ((*WEB, Unpoison(T0 + SECOND, 0x100)), 0, "OK - no poisoned page of a VM is known"),
        ((Poison(T0, 5, "free buddy page", "Recovered"),), 0, "OK - nothing urgent: 1 unowned"),
        ((Poison(T0, 5, "kernel slab page", "Ignored"),), 2, "CRITICAL - kernel: The host can go"),
        ((*WEB, Lost(T0, "ring", 7)), 1, "; lost within an hour: 7 at ring | "),
    ],
)
def test_the_state_follows_the_urgency(
    tmp_path: Path, events: tuple[Event, ...], status: int, said: str
) -> None:
    code, line = checked(tmp_path, *events)
    assert (code, said in line) == (status, True), line


def test_a_vm_that_loops_is_critical_and_the_line_says_what_to_do() -> None:
    result = invoke("check", "--from", STORY)
    assert result.exit_code == 2
    assert result.stdout == (
        "KVMTRACE CRITICAL - looping: web-1 has been stuck on a poisoned page for 5 min:"
        " stop and start the VM (4f2311-1); and 1 stopped, 1 latent | looping=1 stopped=1"
        " undelivered=0 kernel=0 unclear=0 latent=1 unowned=0 handled=0 vms=4 poisoned_pages=3"
        " kernel_poisoned_pages=0 probes_missing=0 lost=0c\n"
    )
    told = json.loads(invoke("check", "--from", STORY, "--json").stdout)
    assert (told["state"], told["status"], told["numbers"]["vms"]) == ("critical", 2, 4)


def test_a_loss_of_long_ago_is_counted_and_warns_no_more(tmp_path: Path) -> None:
    seen = VmSeen(T0, 1, 4001, "web")
    for late, status in ((HOUR // 2, 1), (2 * HOUR, 0)):
        later = VmSeen(T0 + late, 2, 4002, "db")
        code, line = checked(tmp_path, seen, Lost(T0, "ring", 7), later)
        assert (code, "lost=7c" in line) == (status, True)


def test_a_probe_that_is_missing_is_a_warning(tmp_path: Path) -> None:
    code, line = checked(tmp_path, *WEB[:1], probes=(*ATTACHED, Probe("mce", False, why="gone")))
    assert code == 1
    assert "; not attached: mce | " in line
    assert "probes_missing=1" in line


def test_a_name_cannot_begin_the_numbers(tmp_path: Path) -> None:
    code, line = checked(tmp_path, VmSeen(T0, 1, 4001, "a|looping=0"), *WEB[1:])
    assert code == 1
    assert "a/looping=0 has had a poisoned page" in line


def test_every_state_has_its_line() -> None:
    for snapshot in (Snapshot(), snapshots.small(), snapshots.empty()):
        line = check(snapshot, snapshots.NOW, {}).line()
        assert PLUGIN.fullmatch(f"{line}\n"), line
    assert unknown("why|not\nso").line() == "KVMTRACE UNKNOWN - why/not so"


# -- unknown: the status must not be one that means something else


def test_without_a_serve_it_is_unknown() -> None:
    result = invoke("check")
    assert (result.exit_code, result.stderr) == (CheckState.UNKNOWN, "")
    assert result.stdout.startswith("KVMTRACE UNKNOWN - no kvmtrace serve answers on this host: ")
    told = json.loads(invoke("check", "--json").stdout)
    assert (told["state"], told["status"], told["numbers"]) == ("unknown", 3, {})


@pytest.mark.parametrize(
    "arguments", [("--bogus",), ("extra",), ("--from",), ("--from", "/nix"), ("--from", __file__)]
)
def test_wrong_usage_and_bad_files_are_unknown(arguments: tuple[str, ...]) -> None:
    result = invoke("check", *arguments)
    assert (result.exit_code, result.stderr) == (CheckState.UNKNOWN, "")
    assert PLUGIN.fullmatch(result.stdout), result.stdout


def test_a_damaged_recording_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "damaged.jsonl"
    path.write_text(Path(STORY).read_text() + "nonsense\n")
    result = invoke("check", "--from", str(path))
    assert result.exit_code == CheckState.UNKNOWN
    assert PLUGIN.fullmatch(result.stdout), result.stdout


# -- a running serve


def test_it_asks_the_serve(serve: Serve) -> None:
    """And attaches nothing (the fixture fails if it did)."""
    result = invoke("check")
    assert result.exit_code == 2
    assert result.stdout.startswith("KVMTRACE CRITICAL - stopped: web-1 has been hit by a poisoned")
    assert result.stderr == ""
