"""The live table under Textual's pilot: what stands on the screen after which keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from kvmtrace.errors import KvmtraceError
from kvmtrace.model import Snapshot
from kvmtrace.views.format import cells
from kvmtrace.views.terminal.app import Canvas, TopApp, run
from kvmtrace.views.terminal.screen import frame
from kvmtrace.views.terminal.ui_state import UiState
from tests.unit import snapshots

NEVER = 3600.0  # tests tick by hand


class Clock:
    def __init__(self) -> None:
        self.ns = snapshots.NOW

    def __call__(self) -> int:
        return self.ns


def app_of(
    snapshot: Callable[[], Snapshot] | Snapshot, clock: Callable[[], int] | None = None
) -> TopApp:
    source = snapshot if callable(snapshot) else lambda: snapshot
    return TopApp(source, NEVER, clock or Clock())


def screen(app: TopApp) -> list[str]:
    """What the widget draws, as text."""
    canvas = app.query_one(Canvas)
    return [canvas.render_line(y).text.rstrip() for y in range(canvas.size.height)]


def row(lines: list[str], start: str) -> str:
    return next(line for line in lines if line.startswith(start))


async def test_first_screen() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        lines = screen(app)
        assert len(lines) == 24
        assert "db-host-17  Linux 6.18.12" in lines[0]
        assert lines[1] == "probes 2 of 3 attached, not attached: mce"
        assert lines[3].split() == ["▶", "VMs", "4"]
        assert row(lines, "web-1").split()[:4] == ["web-1", "4001", "200000", "12"]
        assert row(lines, "103275-1").split()[:4] == ["103275-1", "looping", "web-1", "0x1f000"]
        assert lines[-1].endswith("q quit")


async def test_nothing_yet() -> None:
    app = app_of(snapshots.empty())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("enter", "down", "tab", "enter")
        assert "  no VMs seen" in screen(app)
        assert "  no incidents" in screen(app)


async def test_markup_in_names_is_text() -> None:
    app = app_of(snapshots.odd())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        assert row(screen(app), "[red]x[/red]").split()[1] == "4002"


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 50), (30, 8), (10, 3), (1, 1)])
@pytest.mark.parametrize("page", ["main", "vm", "incident", "probes", "help"])
@pytest.mark.parametrize("world", [snapshots.small, snapshots.odd, snapshots.empty, snapshots.many])
def test_every_frame_fits(size: tuple[int, int], page: str, world: Callable[[], Snapshot]) -> None:
    state = UiState(page=page, shown=1 if page == "vm" else "103275-1")
    state.take(world(), snapshots.NOW, {})
    lines = frame(state, *size)
    assert len(lines) == size[1]
    assert max(cells("".join(text for text, _ in drawn.line)) for drawn in lines) <= size[0]


async def test_counts_and_rates_follow_the_snapshots() -> None:
    clock, world = Clock(), snapshots.small()
    app = app_of(lambda: world, clock)
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.pause()
        assert row(screen(app), "web-1").split()[6] == "-"
        busy = dataclasses.replace(world.vms[1], exits={("EHWPOISON", "hwpoison"): 200512})
        world = dataclasses.replace(world, vms={**world.vms, 1: busy})
        clock.ns += 2 * snapshots.SECOND
        app.tick()
        shown = row(screen(app), "web-1").split()
        assert shown[3] == "200512"
        assert shown[6] == "250"


async def test_only_changed_lines_are_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    world = snapshots.small()
    app = app_of(lambda: world)
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.pause()
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
        await pilot.press("s")
        assert "by VM ↑" in screen(app)[3]
        assert [s.split()[0] for s in screen(app)[5:9]] == (
            ["batch", "database-with-a-long-name", "pid", "web-1"]
        )
        await pilot.press("S")
        assert "by VM ↓" in screen(app)[3]
        assert screen(app)[5].startswith("web-1")
        await pilot.press(*["s"] * 12)
        assert "by " not in screen(app)[3]  # once round: by urgency again


async def test_selection_stays_with_its_row_when_rows_move() -> None:
    world = snapshots.small()
    app = app_of(lambda: world)
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("down")
        worse = dataclasses.replace(world.vms[2], poisoned_pages=9)
        world = dataclasses.replace(world, vms={**world.vms, 2: worse})
        app.tick()
        assert screen(app)[5].startswith("database")  # it moved to the top
        await pilot.press("enter")
        assert screen(app)[3].strip() == "database-with-a-long-name"


async def test_filter() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("slash", "W", "E", "q", "backspace", "b")
        assert screen(app)[-1].startswith("filter by VM: WEb")
        await pilot.press("enter")
        lines = screen(app)
        assert "filter 'WEb'" in lines[3]
        assert [s for s in lines if s.startswith(("database", "batch"))] == []
        assert [s.split()[0] for s in lines if " web-1 " in s] == ["103275-1", "1032a0-1"]
        await pilot.press("slash", "[", "x", "enter")
        assert "  nothing matches 'WEb[x'" in screen(app)
        await pilot.press("escape")
        assert row(screen(app), "batch (gone)")


async def test_vm_details() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(100, 40)) as pilot:
        await pilot.press("enter")
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
        assert screen(app)[3].startswith("▶ VMs")
        assert app.is_running


async def test_exits_of_a_vm_most_frequent_first() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(100, 40)) as pilot:
        await pilot.press("down", "enter")
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
    async with app.run_test(size=(100, 40)) as pilot:
        await pilot.press("tab", "down", "enter")
        text = "\n".join(screen(app))
        for part in (
            "Incident 200-1: delivered",
            "state             unclear  a VMM was notified, and what",
            "page       pfn 0x200, dirty unevictable LRU page, Recovered",
            "latency           90 s from poison to first delivery",
            "owner      database-with-a-long-name (pid 4002, qemu): gfn 0x1234",
            "owner      a VM not known by name: gfn not known",
        ):
            assert part in text


async def test_details_of_what_was_forgotten() -> None:
    world = snapshots.small()
    app = app_of(lambda: world)
    async with app.run_test(size=(100, 40)) as pilot:
        await pilot.press("enter")
        world = snapshots.empty()
        app.tick()
        assert "  this VM is no longer remembered" in screen(app)


async def test_help_and_probes() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("question_mark")
        assert screen(app)[3].strip() == "keys"
        await pilot.press("end")
        assert any(line.startswith("  other ") for line in screen(app))
        await pilot.press("question_mark", "i")
        assert row(screen(app), "  mce") == (
            "  mce   missing   no such tracepoint; not seen: machine checks"
        )


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
        await pilot.press("p")
        app.tick()
        assert "PAUSED" not in screen(app)[0]
        assert "  no VMs seen" in screen(app)
        await pilot.press("p")
        failure = KvmtraceError("gone")
        app.tick()
        await pilot.pause()
    assert app.failure is failure


async def test_many_vms_scroll() -> None:
    app = app_of(snapshots.many())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("end")
        assert any(line.startswith("vm-001 ") for line in screen(app))
        assert "of 300" in screen(app)[3]
        await pilot.press("home", "pagedown")
        assert not any(line.startswith("vm-300 ") for line in screen(app))


async def test_resize() -> None:
    app = app_of(snapshots.small())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.resize_terminal(140, 30)
        await pilot.pause()
        assert len(screen(app)) == 30
        assert "VMM" in screen(app)[4]
        await pilot.resize_terminal(60, 10)
        await pilot.pause()
        assert len(screen(app)) == 10
        assert screen(app)[-1].startswith("enter details")


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
        run(snapshots.small, 1.0)  # pytest's stdin is no terminal
    assert "--once" in refused.value.hint
