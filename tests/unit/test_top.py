"""The live table under Textual's pilot: what stands on the screen after which keys."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest

from kvmtrace.correlate import Correlator
from kvmtrace.errors import KvmtraceError
from kvmtrace.judgement.actions import actions
from kvmtrace.judgement.urgency import Urgency
from kvmtrace.model import CAUSES, ErrorHistory, Origin, Snapshot, VerdictWord
from kvmtrace.views.format import cells, plain
from kvmtrace.views.terminal.app import Canvas, TopApp, run
from kvmtrace.views.terminal.pages import help_page
from kvmtrace.views.terminal.screen import frame
from kvmtrace.views.terminal.ui_state import _WISHES, UiState
from kvmtrace.views.terminal.watched import Watched
from tests.unit import snapshots
from tests.unit.fake import STORY

NEVER = 3600.0  # tests tick by hand


class Clock:
    def __init__(self) -> None:
        self.ns = snapshots.NOW

    def __call__(self) -> int:
        return self.ns


def app_of(
    snapshot: Callable[[], Snapshot | None] | Snapshot,
    clock: Callable[[], int] | None = None,
    **more: Any,
) -> TopApp:
    source = snapshot if callable(snapshot) else lambda: snapshot
    return TopApp(Watched(source, clock or Clock(), **more), NEVER)


def screen(app: TopApp) -> list[str]:
    """What the widget draws, as text."""
    canvas = app.query_one(Canvas)
    return [canvas.render_line(y).text.rstrip() for y in range(canvas.size.height)]


def row(lines: list[str], start: str) -> str:
    """The last line that begins so: the summary may, too."""
    return [line for line in lines if line.startswith(start)][-1]


def tabs(lines: list[str]) -> str:
    return next(line for line in lines if "Events" in line and "Probes" in line)


def ids(lines: list[str]) -> list[str]:
    """The incidents in the table, from above."""
    return [
        found[0]
        for line in lines
        if line.split()[:1] and line.split()[0] in set(Urgency)
        for found in [re.findall(r"(?<=\s)[0-9a-g]+-[0-9]+(?=\s)", line)]
        if found
    ]


async def test_first_screen() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        lines = screen(app)
        assert len(lines) == 24
        assert "db-host-17" in lines[0]
        assert lines[0].endswith("1 looping  1 unclear  1 latent  1 unowned")
        assert lines[1].startswith("web-1 has been stuck on a poisoned page for 59 s: ")
        assert lines[1].endswith(brief("103275-1"))
        assert lines[2] == "7 lost (ring buffer)  mce not attached"
        assert tabs(lines).startswith("[Incidents 4]  VMs 3  DIMMs 0  Events  Probes 2/3")
        assert row(lines, "looping").split()[:3] == ["looping", "web-1", "103275-1"]
        assert brief("103275-1") in row(lines, "looping")
        assert any(line.startswith("── 103275-1") for line in lines)
        assert lines[-1].endswith("q quit")


def brief(incident: str) -> str:
    small = snapshots.small()
    (one,) = [one for one in small.incidents if one.id == incident]
    return actions(one, small)[0].brief


async def test_nothing_yet() -> None:
    app = app_of(snapshots.empty())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        assert "  no poisoned page" in screen(app)
        for _, nothing in zip(range(4), ("no VMs", "no error", "no events"), strict=False):
            await pilot.press("tab", "enter", "down", "y")
            assert any(line.startswith(f"  {nothing}") for line in screen(app))


async def test_nothing_to_show_while_probes_are_attached() -> None:
    world: Snapshot | None = None
    status = "attaching 18 probes by eBPF … 3 s"
    app = app_of(lambda: world, status=lambda: status)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("tab", "enter", "s")
        lines = screen(app)
        assert lines[1] == status
        assert not any("Incidents" in line for line in lines)
        world, status = snapshots.small(), ""
        app.tick()
        assert "attaching" not in "".join(screen(app))
        assert tabs(screen(app))


async def test_a_host_without_incidents_shows_its_vms_until_there_is_one() -> None:
    world = snapshots.many()
    app = app_of(lambda: world)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        assert "[VMs 300]" in tabs(screen(app))
        assert any("nothing to do" in line for line in screen(app))
        world = dataclasses.replace(world, incidents=snapshots.small().incidents)
        app.tick()
        assert "[Incidents 4]" in tabs(screen(app))
        # Not under the hands of somebody who looks at something else.
        await pilot.press("tab")
        world = snapshots.many()
        app.tick()
        assert "[VMs 300]" in tabs(screen(app))


async def test_markup_in_names_is_text() -> None:
    app = app_of(snapshots.odd())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("2")
        assert row(screen(app), "[red]x[/red]").split()[1] == "4002"


@pytest.mark.parametrize(
    "size", [(160, 48), (80, 24), (40, 24), (120, 40), (200, 50), (30, 8), (10, 3), (1, 1)]
)
@pytest.mark.parametrize("keys", ["", "2", "3", "4", "5", "enter", "2 enter", "5 enter", "?"])
@pytest.mark.parametrize("world", [snapshots.small, snapshots.odd, snapshots.empty, snapshots.many])
def test_every_frame_fits(size: tuple[int, int], keys: str, world: Callable[[], Snapshot]) -> None:
    state = UiState()
    state.take(world(), snapshots.NOW)
    for key in keys.split():
        state.press({"?": "question_mark"}.get(key, key), key if len(key) == 1 else None)
    lines = frame(state, *size)
    assert len(lines) == size[1]
    assert max(cells("".join(text for text, _ in drawn.line)) for drawn in lines) <= size[0]


async def test_counts_and_rates_follow_the_snapshots() -> None:
    clock, world = Clock(), snapshots.small()
    app = app_of(lambda: world, clock)
    async with app.run_test(size=(140, 30)) as pilot:
        await pilot.press("2")
        assert row(screen(app), "web-1").split()[6] == "-"
        busy = dataclasses.replace(world.vms[1], exits={("EHWPOISON", "hwpoison"): 200512})
        loops = dataclasses.replace(world.incidents[1], exits=200512)
        world = dataclasses.replace(
            world,
            vms={**world.vms, 1: busy},
            incidents=(world.incidents[0], loops, *world.incidents[2:]),
        )
        clock.ns += 2 * snapshots.SECOND
        app.tick()
        shown = row(screen(app), "web-1").split()
        assert shown[3] == "200512"
        assert shown[6:8] == ["█", "250"]
        await pilot.press("1")
        assert "200,514×" in row(screen(app), "looping")
        assert "█ 256" in row(screen(app), "looping")


async def test_only_changed_lines_are_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    world = snapshots.small()
    app = app_of(lambda: world)
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("2")
        app.tick()  # with rates
        canvas = app.query_one(Canvas)
        redrawn: list[int] = []
        monkeypatch.setattr(
            canvas, "refresh", lambda *regions, **_: redrawn.extend(region.y for region in regions)
        )
        app.tick()
        assert redrawn == []
        changed = dataclasses.replace(world.vms[2], poisoned_pages=0)
        world = dataclasses.replace(world, vms={**world.vms, 2: changed})
        app.tick()
        assert redrawn == [next(y for y, s in enumerate(screen(app)) if s.startswith("database"))]


async def test_sorting_and_reverse() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("2", "a", "s")
        assert "by VM ↑" in tabs(screen(app))
        assert [s.split()[0] for s in screen(app)[4:8]] == (
            ["batch", "database-with-a-long-name", "pid", "web-1"]
        )
        await pilot.press("S")
        assert "by VM ↓" in tabs(screen(app))
        assert screen(app)[4].startswith("web-1")
        await pilot.press(*["s"] * 12)
        assert tabs(screen(app)).endswith("by urgency")  # once round


async def test_direct_sort_keys() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("t")
        assert tabs(screen(app)).endswith("by SINCE ↓")
        newest_first = ids(screen(app))
        assert newest_first == ["1032a0-1", "103275-1", "200-1", "88-1"]
        await pilot.press("t")
        assert ids(screen(app)) == newest_first[::-1]
        await pilot.press("n")
        assert ids(screen(app))[0] == "103275-1"
        await pilot.press("u")
        assert tabs(screen(app)).endswith("by urgency")
        await pilot.press("X")
        assert "no function on 'X'" in screen(app)[-1]


@pytest.mark.parametrize("tab", [0, 1, 2, 3, 4])
def test_each_sort_key_is_told_and_has_one_meaning(tab: int) -> None:
    state = UiState(tab=tab)
    taken = set(_WISHES) | set("aijkhqsSu/?") | set("0123456789")
    keys = [column.key for column in state.table.columns if column.key]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & taken
    for column in state.table.columns:
        if column.key:
            state.press(column.key, column.key)
            assert state.table.by is column
            assert column.name in state.table.order
    text = "\n".join(plain(line) for line in help_page(state))
    assert f"  {' '.join(['u', *keys])} " in text


async def test_open_only_or_all() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.pause()
        assert "g77-1" not in ids(screen(app))
        assert "1 over (a)" in tabs(screen(app))
        await pilot.press("a")
        assert ids(screen(app))[-1] == "g77-1"
        assert "[Incidents 5]  VMs 4" in tabs(screen(app))
        await pilot.press("a", "2")
        assert not [line for line in screen(app) if line.startswith("batch")]


async def test_all_are_over() -> None:
    small = snapshots.small()
    app = app_of(dataclasses.replace(small, incidents=small.incidents[-1:]))
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.pause()
        assert "  none is open; 1 over (a shows them)" in screen(app)
        assert screen(app)[1].startswith("nothing to do: 1 incident, all over")


async def test_selection_stays_with_its_row_when_rows_move() -> None:
    world = snapshots.small()
    app = app_of(lambda: world)
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("2", "down")
        worse = dataclasses.replace(world.vms[2], poisoned_pages=9)
        world = dataclasses.replace(world, vms={**world.vms, 2: worse})
        app.tick()
        assert screen(app)[4].startswith("database")  # it moved to the top
        await pilot.press("enter")
        assert screen(app)[2].strip() == "database-with-a-long-name"


async def test_filter_finds_in_every_column() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("slash", "W", "E", "q", "backspace", "b")
        assert screen(app)[-1].startswith("filter: WEb")
        await pilot.press("enter")
        assert "filter 'WEb'" in tabs(screen(app))
        assert ids(screen(app)) == ["103275-1", "1032a0-1"]
        assert "VMs 1" in tabs(screen(app))
        await pilot.press("slash", "[", "x", "enter")
        assert "  nothing matches 'WEb[x'" in screen(app)
        await pilot.press("escape")
        for text, found in (
            ("free buddy", ["88-1"]),  # a column that is not on the screen
            ("0x1234", ["200-1"]),  # a gfn
            ("unowned", ["88-1"]),
        ):
            await pilot.press("slash", *text, "enter")
            assert ids(screen(app)) == found
            await pilot.press("escape")
        await pilot.press("2", "slash", *"11111111-2222", "enter")
        assert "[VMs 1]" in tabs(screen(app))


async def test_vm_details() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(100, 40)) as pilot:
        await pilot.press("2", "enter")
        text = "\n".join(screen(app))
        for part in (
            "uuid              11111111-2222-3333-4444-555555555555",
            "EHWPOISON   hwpoison      200000",
            "EFAULT      conversion        12",
            "103275-1    looping     gfn 0x1f000  exits 200000  SIGBUS 2",
            "pfn 0x103275 poisoned: Failed  (103275-1)",
            "last delivery so far",
        ):
            assert part in text
        await pilot.press("q")  # back, not out: what was counted would be gone
        assert "[VMs 3]" in tabs(screen(app))
        assert app.is_running


async def test_exits_of_a_vm_most_frequent_first() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(100, 40)) as pilot:
        await pilot.press("2", "down", "enter")
        lines = screen(app)
        start = lines.index("  exits by errno and cause") + 1
        assert [line.split() for line in lines[start : start + 4]] == [
            ["EINVAL", "other", "5"],
            ["EFAULT", "cause", "unknown", "4"],
            ["EFAULT", "backing", "3"],
            ["EHWPOISON", "hwpoison", "1"],
        ]


async def test_incident_details() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(100, 60)) as pilot:
        await pilot.press("down", "enter")
        text = "\n".join(screen(app))
        for part in (
            "UNCLEAR  database-with-a-long-name ",
            "state             unclear  a VMM was notified, and what",
            "The page (incident 200-1)",
            "pfn 0x200, size not known, dirty unevictable LRU page, Recovered",
            "latency           90 s from poison to first delivery",
            "gfn 0x1234 of database-with-a-long-name (pid 4002, qemu)",
            "unknown gfn of a VM not known by name",
        ):
            assert part in text


async def test_the_pane_is_about_the_selected_row_where_there_is_room() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("down")
        assert any(line.startswith("── 200-1") for line in screen(app))
        assert any("gpa 0x1234000" in line for line in screen(app))
        await pilot.press("2", "home")
        assert any(line.startswith("── web-1") for line in screen(app))
        await pilot.press("5")
        assert any(line.startswith("── mce") for line in screen(app))
        assert any(line.startswith("missing  no such tracepoint") for line in screen(app))
        await pilot.resize_terminal(80, 12)
        await pilot.press("1")
        assert not any(line.startswith("──") for line in screen(app))
        assert len(ids(screen(app))) == 4


async def test_details_of_what_was_forgotten() -> None:
    world = snapshots.small()
    app = app_of(lambda: world)
    async with app.run_test(size=(100, 40)) as pilot:
        await pilot.press("2", "enter")
        world = snapshots.empty()
        app.tick()
        assert "  this VM is no longer remembered" in screen(app)
        await pilot.press("q", "1")
        world = snapshots.small()
        app.tick()
        await pilot.press("enter")
        world = snapshots.empty()
        app.tick()
        assert "  this incident is no longer remembered" in screen(app)


async def test_events_newest_first() -> None:
    correlator = Correlator()
    told = tuple(correlator.feed(event) for event in STORY)
    world = dataclasses.replace(correlator.snapshot(), host=snapshots.HOST)
    app = app_of(world, recent=lambda: told)
    async with app.run_test(size=(140, 30)) as pilot:
        await pilot.press("4")
        lines = [line for line in screen(app) if " EFAULT" in line or " Failed" in line]
        assert [" exit " in line for line in lines[:2]] == [True, False]
        await pilot.press("slash", *"Failed", "enter")
        assert any(line.startswith("── event") for line in screen(app))
        await pilot.press("enter")  # the story of its incident
        assert any("(incident 103275-1)" in line for line in screen(app))
        await pilot.press("q")
        assert "[Events]" in tabs(screen(app))


async def test_dimms() -> None:
    history = ErrorHistory(38, 37, snapshots.NOW - 3600 * snapshots.SECOND, snapshots.NOW)
    small = snapshots.small()
    bad = dataclasses.replace(small.incidents[1], origin=Origin(("mce",), history, label="A1"))
    app = app_of(
        dataclasses.replace(
            small,
            dimms={"B2": ErrorHistory(90, 90, 0, 0), "A1": history},
            incidents=(bad, *small.incidents[2:]),
        )
    )
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("3")
        lines = screen(app)
        assert row(lines, "DIMM A1").split() == (
            ["DIMM", "A1", "1", "37", "1", "60", "min", "0", "s", "web-1"]
        )
        at = [n for n, line in enumerate(lines) if line.startswith(("DIMM A1", "DIMM B2"))]
        assert lines[at[0]].startswith("DIMM A1")


async def test_help_explains_the_words() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("question_mark")
        assert screen(app)[3].strip() == "keys"
        await pilot.press("end")
        assert any(line.startswith("  other ") for line in screen(app))
        await pilot.press("question_mark")
        assert tabs(screen(app))
    text = "\n".join(plain(line) for line in help_page(UiState()))
    for word in (*Urgency, *VerdictWord, "AR", "AO", "lost", *CAUSES):
        assert f"\n  {word} " in text


async def test_probes() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("i")
        lines = screen(app)
        assert "[Probes 2/3]" in tabs(lines)
        assert row(lines, "mce  ").split()[:2] == ["mce", "missing"]
        assert any(line.startswith("shows    machine checks") for line in lines)


async def test_pause_keeps_the_screen_and_still_notices_a_failure() -> None:
    clock, world = Clock(), snapshots.small()
    failure: Exception | None = None

    def snapshot() -> Snapshot:
        if failure:
            raise failure
        return world

    app = app_of(snapshot, clock)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("p")
        before = screen(app)
        assert "PAUSED" in before[0]
        world, clock.ns = snapshots.empty(), clock.ns + snapshots.SECOND
        app.tick()
        assert screen(app) == before
        await pilot.press("space")
        assert "PAUSED" not in screen(app)[0]
        assert "  no poisoned page" in screen(app)
        await pilot.press("p")
        failure = KvmtraceError("gone")
        app.tick()
        await pilot.pause()
    assert app.failure is failure


async def test_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    app = app_of(snapshots.small())
    monkeypatch.setattr(app, "copy_to_clipboard", copied.append)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("y")
        assert "103275-1" in copied[0]
        assert "clipboard" in screen(app)[-1]
        await pilot.press("2", "y")
        assert "11111111-2222-3333-4444-555555555555" in copied[1]


async def test_bundle() -> None:
    begun, done = threading.Event(), threading.Event()

    def bundle() -> str:
        begun.set()
        done.wait(20)
        return "case.tar.gz: explain.txt"

    app = app_of(snapshots.small(), bundle=bundle)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("b")
        assert begun.wait(20)
        assert screen(app)[-1] == "writing a bundle …"
        await pilot.press("b")
        assert screen(app)[-1] == "a bundle is being written"
        done.set()
        for _ in range(200):
            await pilot.pause(0.02)
            if "case.tar.gz" in screen(app)[-1]:
                break
        assert screen(app)[-1] == "case.tar.gz: explain.txt"


async def test_bundle_that_fails() -> None:
    def bundle() -> str:
        raise KvmtraceError("case.tar.gz exists")

    app = app_of(snapshots.small(), bundle=bundle)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("b")
        for _ in range(200):
            await pilot.pause(0.02)
            if "exists" in screen(app)[-1]:
                break
        assert screen(app)[-1] == "no bundle: case.tar.gz exists"


async def test_many_vms_scroll() -> None:
    app = app_of(snapshots.many())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("end")
        assert any(line.startswith("vm-001 ") for line in screen(app))
        assert "of 300" in screen(app)[-1]
        await pilot.press("home", "pagedown")
        assert not any(line.startswith("vm-300 ") for line in screen(app))


async def test_resize() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("2")
        await pilot.resize_terminal(140, 30)
        await pilot.pause()
        assert len(screen(app)) == 30
        assert "VMM" in screen(app)[3]
        await pilot.resize_terminal(60, 10)
        await pilot.pause()
        assert len(screen(app)) == 10
        assert screen(app)[-1].startswith("enter whole story")


@pytest.mark.parametrize("key", ["q", "ctrl+c"])
async def test_quit(key: str) -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press(key)
        await pilot.pause()
        assert not app.is_running
    assert app.failure is None


@pytest.mark.parametrize("set_", [True, False])
async def test_no_color(monkeypatch: pytest.MonkeyPatch, set_: bool) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if set_:
        monkeypatch.setenv("NO_COLOR", "1")
    app = app_of(snapshots.small())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        canvas = app.query_one(Canvas)
        segments = [segment for y in range(24) for segment in canvas.render_line(y)]
        coloured = {s.style.color.name for s in segments if s.style and s.style.color}
        assert coloured == (set() if set_ else {"red", "yellow", "cyan"})


def test_refuses_without_a_terminal() -> None:
    with pytest.raises(KvmtraceError) as refused:
        run(Watched(snapshots.small))  # pytest's stdin is no terminal
    assert "--once" in refused.value.hint
