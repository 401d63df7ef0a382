"""The next serve goes on where an earlier one ended: over restarts, kills and reboots."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from kvmtrace.events import (
    Event,
    Exit,
    Found,
    GmemPage,
    KernelCounts,
    Lost,
    Owned,
    Owner,
    Poison,
    Reboot,
    VmGone,
    VmSeen,
)
from kvmtrace.model import Snapshot
from kvmtrace.session import archive as archives
from kvmtrace.session import archive_file, archive_story
from kvmtrace.session.archive_story import keys_of, rekeyed
from kvmtrace.session.resumed import ResumedSource
from kvmtrace.session.session import Session
from kvmtrace.views.incident_log import IncidentLog
from kvmtrace.views.web.metrics import Exporter
from tests.unit import archives as kit
from tests.unit.archives import HOST, POISONED, SEEN, archive, keep, kept, model_of
from tests.unit.fake import SECOND, STORY, T0, FakeSource
from tests.unit.waiting import until

path, one_boot = kit.path, kit.one_boot

PFN = 0x103275
PAGE = "dirty unevictable LRU page"
LATENT: list[Event] = [
    SEEN,
    Poison(T0 + SECOND, PFN, PAGE, "Failed"),
    Owned(T0 + SECOND, PFN, Owner(7, 8, 0x7000), "pagemap", 4096),
]
AGAIN = VmSeen(T0 + 60 * SECOND, 1, 4001, "web-1", "u-1", "qemu")


def resumed(past: list[Event], *batches: list[Event], path: str) -> list[Event]:
    one = archive(path)
    first = max([0, *(key + 1 for event in past for key in keys_of(event))])
    source = ResumedSource(FakeSource(*batches), past, one, lambda: T0 + 99 * SECOND, first)
    events = [event for _ in batches for event in source.poll(0)]
    source.close()
    return events


def served(path: str, *batches: list[Event], killed_to: str | None = None) -> Snapshot:
    """The model of a serve that had these events. ``killed_to``: a copy as a kill leaves it."""
    one = archive(path)
    past, first = one.begin()
    session = Session(
        ResumedSource(FakeSource(*batches), past, one, lambda: T0 + 99 * SECOND, first)
    )
    one.start()
    for _ in batches:
        session.pump(0)
    snapshot = session.snapshot()
    until(lambda: not one.waits)
    if killed_to is not None:
        for suffix in ("", "-wal"):
            shutil.copy(path + suffix, killed_to + suffix)
    session.close()
    return snapshot


def samples(snapshot: Snapshot) -> dict[str, float]:
    """{name and labels: value} of the counters that are not 0."""
    return {
        f"{one.name}{sorted(one.labels.values())}": one.value
        for family in Exporter(lambda: snapshot).collect()
        if family.type == "counter"
        for one in family.samples
        if one.value
    }


def test_a_vm_that_still_runs_keeps_its_key_and_its_counts(path: str) -> None:
    again = VmSeen(T0 + SECOND, 1, 4001, "web-1", "u-1", "qemu")
    more = Exit(T0 + 2 * SECOND, 1, 0, 133, 39, True, 7, gfn=8, count=2)
    events = resumed(POISONED, [again], [more], path=path)
    model = model_of(events)
    (vm,) = model.vms.values()
    assert vm.exits == {("EHWPOISON", "hwpoison"): 7}
    assert [one.exits for one in model.incidents] == [7]
    assert not vm.gone


@pytest.mark.parametrize(
    "now",
    [
        VmSeen(T0 + SECOND, 1, 4002, "web-1", "u-1", "qemu"),
        VmSeen(T0 + SECOND, 1, 4001, "db-1", None, "qemu"),
        VmSeen(T0 + SECOND, 1, 4001, "web-1", "u-2", "qemu"),
    ],
)
def test_a_vm_that_ended_meanwhile_is_gone_and_another_has_its_own_key(
    now: VmSeen, path: str
) -> None:
    events = resumed(POISONED, [now], path=path)
    assert [event.vm for event in events if isinstance(event, VmGone)] == [7]
    assert [event.vm for event in events if isinstance(event, VmSeen)] == [7, 9]


def test_two_vms_of_one_process_keep_theirs(path: str) -> None:
    past: list[Event] = [VmSeen(T0, 0, 5, "both"), VmSeen(T0, 1, 5, "both")]
    now: list[Event] = [VmSeen(T0 + 1, 3, 5, "both"), VmSeen(T0 + 1, 4, 5, "both")]
    events = resumed(past, now, path=path)
    assert [event.vm for event in events if isinstance(event, VmSeen)] == [0, 1, 0, 1]
    assert not [event for event in events if isinstance(event, VmGone)]


def test_what_the_kernel_handled_in_between_was_missed(path: str) -> None:
    past: list[Event] = [KernelCounts(T0, (("total", 1),), at_start=True)]
    events = resumed(past, [KernelCounts(T0 + 1, (("total", 3),), at_start=True)], path=path)
    assert [event.at_start for event in events if isinstance(event, KernelCounts)] == [True, False]


def test_only_new_events_are_kept_with_the_keys_of_this_boot(path: str) -> None:
    keep(path, POISONED)
    one = archive(path)
    past, first = one.begin()
    again = VmSeen(T0 + SECOND, 1, 4001, "web-1", "u-1", "qemu")
    source = ResumedSource(FakeSource([again]), past, one, lambda: T0, first)
    one.start()
    source.poll(0)
    source.close()
    assert kept(path) == [*POISONED, VmSeen(T0 + SECOND, 7, 4001, "web-1", "u-1", "qemu")]


def test_keys_are_changed_wherever_they_stand() -> None:
    for event in STORY:
        changed = rekeyed(event, lambda vm: vm + 100)
        assert rekeyed(changed, lambda vm: vm - 100) == event
    assert rekeyed(SEEN, lambda vm: vm + 1) != SEEN


# -- pages


def test_a_latent_page_is_found_again_and_joined_to_its_incident(path: str) -> None:
    served(path, LATENT)
    found: list[Event] = [
        AGAIN,
        Found(T0 + 61 * SECOND, PFN),
        Owned(T0 + 61 * SECOND, PFN, Owner(1, 8, 0x7000), "pagemap", 4096),
    ]
    model = served(path, found)
    (incident,) = model.incidents
    assert (incident.state, incident.poisoned_ts) == ("latent", T0 + SECOND)
    assert not incident.before_start
    assert [owner.vm for owner in incident.owners] == [7]
    delivered = [AGAIN, Exit(T0 + 90 * SECOND, 1, 0, 133, 39, True, 7, gfn=8, gmem=133)]
    (incident,) = served(path, delivered).incidents
    assert (incident.state, incident.exits) == ("delivered", 1)


def test_a_page_of_before_a_reboot_is_history_also_if_it_is_poisoned_again(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Poison(T0 + SECOND, 0x500, "reserved kernel page", "Ignored")
    before = served(path, [*LATENT, kernels])
    assert before.kernel_pages == 1
    monkeypatch.setattr(archive_file, "boot_id", lambda: "the next")
    again = VmSeen(T0 + 60 * SECOND, 0, 501, "web-1", "u-1", "qemu")
    owned = GmemPage(1, 8, (Owner(0, 8),))
    model = served(path, [again], [Poison(T0 + 70 * SECOND, PFN, PAGE, "Failed", gmem=owned)])
    assert model.kernel_pages == 0
    assert [(one.id, one.state) for one in model.incidents] == [
        (f"{PFN:x}-1", "closed"),
        ("500-1", "closed"),
        (f"{PFN:x}-2", "latent"),
    ]
    # The next one knows of both boots.
    third = served(path, [again])
    assert [(one.id, one.state) for one in third.incidents] == [
        (one.id, one.state) for one in model.incidents
    ]
    assert sum(not vm.gone for vm in third.vms.values()) == 1


def test_what_the_kernel_handled_before_a_reboot_is_not_missed(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(path, [KernelCounts(T0, (("total", 5),), at_start=True)])
    monkeypatch.setattr(archive_file, "boot_id", lambda: "the next")
    model = served(path, [KernelCounts(T0 + 1, (("total", 2),), at_start=True)])
    assert model.kernel is not None
    assert model.kernel.missed == 0


# -- counters


def test_counters_go_on_after_a_restart_in_order(path: str) -> None:
    first = samples(served(path, list(POISONED)))
    second = samples(served(path, [AGAIN]))
    assert first == second
    assert first["kvmtrace_memory_fault_exits_total['EHWPOISON', 'hwpoison', 'web-1']"] == 5


def test_counters_begin_anew_after_a_kill(path: str) -> None:
    killed = path + "-killed"
    served(path, list(POISONED), killed_to=killed)
    after = served(killed, [AGAIN], [Exit(T0, 1, 0, 133, 39, True, 7, gfn=8, count=2)])
    (vm,) = after.vms.values()
    assert vm.exits_by_errno() == {"EHWPOISON": 7}
    counted = samples(after)
    assert counted["kvmtrace_memory_fault_exits_total['EHWPOISON', 'hwpoison', 'web-1']"] == 2


def test_a_run_that_kept_not_all_did_not_end_in_order(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "QUEUE", 1)
    one = archive(path)
    one.begin()
    one.add([Found(T0, 1), Found(T0, 2)])
    one.start()
    one.close()
    said: list[str] = []
    after = archive(path, said)
    after.begin()
    assert after.was_cut
    assert "did not end in order" in said[0]


# -- keys, summaries, versions


def test_a_serve_that_could_not_read_what_was_has_vms_of_its_own(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(path, list(POISONED))
    opened = archive_file.opened

    def full(path: str) -> sqlite3.Connection:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(archive_file, "opened", full)
    one = archive(path)
    assert one.begin() == ([], 0)
    monkeypatch.setattr(archive_file, "opened", opened)
    one.start()
    one.add([VmSeen(T0 + SECOND, 7, 9, "other")])
    one.close()
    past, first = archive(path).begin()
    assert past[-2:] == [VmGone(T0, 7), VmSeen(T0 + SECOND, 15, 9, "other")]
    assert first == 16


def test_a_file_that_is_replaced_gets_the_vms_that_run(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = archive(path)
    one.begin()
    one.start()
    one.add(POISONED)
    until(lambda: not one.waits)
    monkeypatch.setattr(archives, "_has_run", lambda *_: False)
    with sqlite3.connect(path) as other:
        other.execute("ALTER TABLE events RENAME TO gone")
    other.close()
    one.add([Found(T0 + SECOND, 1)])
    until(lambda: not one.state().is_written)
    Path(path).unlink()
    for suffix in ("-wal", "-shm"):
        Path(path + suffix).unlink(missing_ok=True)
    until(lambda: one.state().is_written)
    one.close()
    assert kept(path) == [SEEN, Found(T0 + SECOND, 1)]


def test_a_start_reads_the_summary_and_what_came_after_it(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_SUMMARY_EVERY", 3)
    keep(path, [])
    one = archive(path)
    one.begin()
    one.start()
    for event in STORY:
        one.add([event])
        until(lambda: not one.waits)
    one.close()
    with sqlite3.connect(path) as database:
        (upto,) = database.execute("SELECT upto FROM summarized").fetchone()
        # What it stands for is not needed.
        database.execute("DELETE FROM events WHERE id <= ?", (upto,))
    database.close()
    assert 0 < upto < len(STORY)
    assert archive(path).begin() == (list(STORY), 3)
    keep(path, [Found(T0 + 9 * SECOND, 1)])
    assert archive(path).begin() == ([*STORY, Found(T0 + 9 * SECOND, 1)], 3)


def test_a_file_of_the_first_version_is_brought_up(path: str) -> None:
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    archive_file.MIGRATIONS[0](database)
    database.execute("PRAGMA user_version = 1")
    host = archive_file.as_json(HOST)
    # Both boots have a VM 7.
    for boot in ("before", "this"):
        database.execute(
            "INSERT INTO runs (boot, began, version, host) VALUES (?, ?, ?, ?)",
            (boot, T0, "0.1", host),
        )
    for run in (1, 2):
        for event in POISONED:
            record = json.dumps({"kind": event.kind, **_fields(event)})
            database.execute(
                "INSERT INTO events (run, ts, record) VALUES (?, ?, ?)", (run, T0, record)
            )
    old = archive_file.reading(path)
    assert len(list(archive_story.whole(old))) == 2 * len(POISONED) + 2
    old.close()
    database.close()
    past, first = archive(path).begin()
    assert past == [
        *POISONED,
        Reboot(T0),
        VmGone(T0, 7),
        *(rekeyed(event, lambda vm: vm + 8) for event in POISONED),
    ]
    assert first == 16


def _fields(event: Event) -> dict[str, object]:
    names = event.__dataclass_fields__
    return {name: value for name in names if (value := getattr(event, name)) is not None}


# -- the log


def logged(*snapshots: Snapshot) -> list[str]:
    log = IncidentLog()
    return [one.message for snapshot in snapshots for one in log.entries(snapshot, T0)]


def test_a_restart_logs_only_what_has_changed(path: str) -> None:
    lost = Lost(T0, "ring", 3)
    before = served(path, [*LATENT, lost])
    assert len(logged(before)) == 2
    same = served(path, [AGAIN])
    assert logged(same) == []
    (entry,) = logged(served(path, [AGAIN, Exit(T0, 1, 0, 133, 39, True, 7, gfn=8, gmem=133)]))
    assert entry.startswith(f"incident {PFN:x}-1: unclear")


def test_what_is_open_is_logged_again_after_a_kill_and_what_is_over_is_not(path: str) -> None:
    killed = path + "-killed"
    over: list[Event] = [
        VmSeen(T0, 9, 5, "batch"),
        Poison(T0, 0x99, PAGE, "Failed", gmem=GmemPage(1, 8, (Owner(9, 8),))),
        VmGone(T0, 9),
    ]
    served(path, [*over, *LATENT], killed_to=killed)
    (entry,) = logged(served(killed, [AGAIN]))
    assert entry.startswith(f"incident {PFN:x}-1: new, latent")
