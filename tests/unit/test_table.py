"""The plain table, its columns and the numbers in its cells."""

from __future__ import annotations

import dataclasses

import pytest

from kvmtrace.judgement.actions import actions
from kvmtrace.model import ErrorHistory, KernelAccount, Origin, Snapshot
from kvmtrace.probes import Probe
from kvmtrace.views.explain import explain_text
from kvmtrace.views.format import (
    age_of,
    cells,
    clip,
    clip_line,
    pad,
    plain,
    rate_of,
    size_of,
    span_of,
)
from kvmtrace.views.tables import columns
from kvmtrace.views.tables.rows import incident_rows, vm_rows
from kvmtrace.views.tables.table import table_text
from kvmtrace.views.terminal import pages
from kvmtrace.views.terminal.trends import Trends, bars
from tests.unit import snapshots

SECOND = snapshots.SECOND


def lines(snapshot: Snapshot, width: int, rates: dict[int, float] | None = None) -> list[str]:
    return table_text(snapshot, now=snapshots.NOW, width=width, rates=rates).split("\n")


def line_of(found: list[str], start: str) -> list[str]:
    """The words of the last such line: the tables are below the summary."""
    return [line for line in found if line.startswith(start)][-1].split()


@pytest.mark.parametrize("width", [20, 40, 79, 80, 81, 100, 120, 200])
@pytest.mark.parametrize("world", [snapshots.empty, snapshots.small, snapshots.odd, snapshots.many])
def test_no_line_is_wider_than_the_terminal(world: object, width: int) -> None:
    assert callable(world)
    for line in lines(world(), width, {1: 12345.6}):
        assert cells(line) <= width
        assert line == line.rstrip()


def test_eighty_columns() -> None:
    found = lines(snapshots.small(), 80, {1: 1234.0})
    assert line_of(found, "VM ") == (
        ["VM", "PID", "EHWPOISON", "EFAULT", "EXITS/S", "AR", "AO", "PAGES", "LAST", "CAUSES"]
    )
    assert line_of(found, "web-1") == (
        ["web-1", "4001", "200000", "12", "1234", "2", "0", "2", "12", "s", "conversion", "12"]
    )
    assert line_of(found, "looping") == (
        ["looping", "web-1", "103275-1", *BRIEF["103275-1"].split()]
    )
    assert line_of(found, "batch (gone)")[2:] == (
        ["4004", "1", "0", "-", "0", "0", "0", "2", "h", "-"]
    )


# By the judgement, which has tests of its own.
BRIEF = {one.id: actions(one, snapshots.small())[0].brief for one in snapshots.small().incidents}


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_what_to_do_stands_at_any_width(width: int) -> None:
    """The columns on the right are dropped first, and no number is cut."""
    found = lines(snapshots.small(), width)
    row = next(line for line in found if line.startswith("looping "))
    assert row.split()[1] == "web-1"
    assert BRIEF["103275-1"][:18] in row
    head = next(line for line in found if line.startswith("STATE "))
    assert ("200,002×" in row) == ("NOTIFIED" in head)
    assert ("103275-1" in row) == ("INCIDENT" in head)


@pytest.mark.parametrize("width", [20, 30, 40, 50])
def test_numbers_are_whole_or_not_there(width: int) -> None:
    found = lines(snapshots.small(), width)
    shown = dict(zip(line_of(found, "VM"), line_of(found, "web-1"), strict=False))
    assert shown["VM"] == "web-1"
    assert shown.get("EHWPOISON", "200000") == "200000"
    assert shown.get("PAGES", "2") == "2"


def test_wide_terminals_show_everything() -> None:
    found = lines(snapshots.small(), 200, {2: 0.25})
    row = line_of(found, "database-with-a-long-name")
    assert row[1:8] == ["4002", "qemu", "1", "7", "5", "0.2", "0"]
    assert " ".join(row[-8:]) == "min ago backing 3, other 5, unknown 4"
    assert any(line.endswith("90 s  Recovered: dirty unevictable LRU page") for line in found)


def test_order_is_urgency_and_gone_vms_come_last() -> None:
    found = lines(snapshots.small(), 120)
    start = next(n for n, line in enumerate(found) if line.startswith("STATE "))
    states = [line.split()[0] for line in found[start + 1 : start + 6]]
    assert states == ["looping", "unclear", "latent", "unowned", "closed"]
    names = [line.split()[0] for line in found if " 400" in line]
    assert names == ["web-1", "database-with-a-long-name", "pid", "batch"]


def test_a_vm_is_called_what_it_is_called_elsewhere() -> None:
    vms = {1: snapshots.vm(1, "shop", vmid="8006"), 3: snapshots.vm(3)}
    found = lines(dataclasses.replace(snapshots.empty(), vms=vms), 120)
    assert any(line.startswith("8006 (shop) ") for line in found)
    assert any(line.startswith("pid 4003 ") for line in found)


def test_what_guest_memfd_refused_and_nobody_was_notified_of() -> None:
    small = snapshots.small()
    latent = small.incidents[0]
    refused = dataclasses.replace(latent, id="9-1", undelivered=3)
    world = dataclasses.replace(small, incidents=(*small.incidents, refused))
    (row,) = [line for line in lines(world, 120) if " 9-1 " in line]
    assert row.split()[0] == "undelivered"
    assert " 3 refused " in row
    assert explain_text(refused, world).startswith("UNDELIVERED  web-1 was refused ")
    page = map(plain, pages.incident_page(world, "9-1", snapshots.NOW))
    assert any(line.split()[:2] == ["state", "undelivered"] for line in page)
    vm = dataclasses.replace(small.vms[1], undelivered=3)
    page = map(plain, pages.vm_page(dataclasses.replace(world, vms={1: vm}), 1, snapshots.NOW, {}))
    text = "3 refusals by guest_memfd of which KVM_RUN did not notify the VMM"
    assert any(text in line for line in page)


def test_colours_are_the_level() -> None:
    rows = incident_rows(snapshots.small(), snapshots.NOW)
    state = columns.INCIDENT_COLUMNS[0]
    assert [state.style(row) for row in rows] == ["bad", "warn", "warn", "note", "dim"]


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (None, "CPU_SrcID#0_Chan#1_DIMM#0  37 CE 2 UE"),
        (30, "…ID#0_Chan#1_DIMM#0 37 CE 2 UE"),
        (20, "…1_DIMM#0 37 CE 2 UE"),
        (12, "…an#1_DIMM#0"),
    ],
)
def test_a_long_label_is_clipped_its_errors_are_not(width: int | None, text: str) -> None:
    label, dimm = "CPU_SrcID#0_Chan#1_DIMM#0", ErrorHistory(39, 37, 0, 0)
    origin = Origin(("mce",), ErrorHistory(1, 0, 0, 0), label=label, dimm=dimm)
    small = snapshots.small()
    bad = dataclasses.replace(small.incidents[1], origin=origin)
    (row,) = incident_rows(dataclasses.replace(small, incidents=(bad,)), snapshots.NOW)
    (column,) = [one for one in columns.INCIDENT_COLUMNS if one.name == "DIMM"]
    assert column.text(row, width) == text


def test_zeros_are_dim() -> None:
    rows = {row.vm.label: row for row in vm_rows(snapshots.small(), snapshots.NOW)}
    (poison,) = [one for one in columns.VM_COLUMNS if one.name == "EHWPOISON"]
    assert poison.style(rows["pid 4003"]) == "dim"
    assert poison.style(rows["web-1"]) == "bad"


def test_gone_outlives_the_end_of_a_long_name() -> None:
    gone = Snapshot(vms={1: snapshots.vm(1, "a-name-that-is-too-long" * 4, gone=True)})
    assert any("… (gone) " in line for line in lines(gone, 80))


def test_numbers_are_aligned_right() -> None:
    found = lines(snapshots.small(), 120)
    head = next(line for line in found if line.startswith("VM "))
    end = head.index("EHWPOISON") + len("EHWPOISON")
    rows = [line for line in found if " 400" in line]
    assert [line[:end].split()[-1] for line in rows] == ["200000", "1", "0", "1"]


def test_header() -> None:
    found = lines(snapshots.small(), 120)[1:]
    assert found[0] == "db-host-17  Linux 6.18.12+deb14-amd64  source bpf (BTF and ring buffer)"
    assert found[1] == "probes 2 of 3 attached, not attached: mce"
    assert found[2] == "  mce   missing   no such tracepoint; not seen: machine checks"
    assert found[3] == (
        "lost 7 at ring buffer  poisons 2 Failed, 2 Recovered  HardwareCorrupted 20 KiB"
    )


def test_what_the_kernel_counted_and_nobody_saw_is_said() -> None:
    account = KernelAccount({"total": 1}, {"total": 4}, 3, 2)
    found = lines(dataclasses.replace(snapshots.small(), kernel=account), 120)
    assert found[5] == (
        "memory failures: the kernel handled 3, kvmtrace saw 2; incidents are missing"
    )
    seen = dataclasses.replace(account, seen=3)
    assert lines(dataclasses.replace(snapshots.small(), kernel=seen), 120)[5] == ""


def test_poison_from_before_the_start_is_kept_apart() -> None:
    incidents = tuple(
        dataclasses.replace(i, before_start=True) for i in snapshots.small().incidents
    )
    found = lines(dataclasses.replace(snapshots.small(), incidents=incidents[:2]), 120)
    assert "poisons 2 Failed, 2 Recovered, 2 before  Hardware" in found[4]


def test_reasons_are_folded_not_cut() -> None:
    why = "the function exists but " * 8 + "END"
    snapshot = dataclasses.replace(snapshots.empty(), probes=(Probe("run", False, why=why),))
    text = " ".join(" ".join(lines(snapshot, 60)).split())
    assert why in text


def test_empty_says_so() -> None:
    found = lines(snapshots.empty(), 80)
    assert "no VMs seen" in found
    assert "no incidents" in found
    assert found[4] == "lost nothing  poisons none  HardwareCorrupted 20 KiB"


def test_unknown_is_a_dash() -> None:
    found = lines(snapshots.odd(), 160)
    assert "host -" in found
    (row,) = [line for line in found if " vm1-1 " in line]
    assert row.split()[:5] == ["unclear", "数据库" * 12, "+1", "vm1-1", "-"]
    assert row.split()[-3:] == ["-", "-", "-"]
    assert any(line.startswith("[red]x[/red] ") for line in found)


def test_width_comes_from_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert table_text(snapshots.small(), now=snapshots.NOW) == table_text(
        snapshots.small(), now=snapshots.NOW, width=70
    )


def test_rates_are_of_what_was_there_at_both_times() -> None:
    trends: Trends[int] = Trends()
    trends.add({1: 10, 3: 7}, 0)
    assert trends.rates == {}
    trends.add({1: 30, 2: 7}, 2 * SECOND)
    trends.add({1: 30, 2: 7}, 2 * SECOND)  # no time between
    assert trends.rates == {1: 10.0}
    trends.add({1: 35, 2: 7}, 3 * SECOND)
    assert trends.rates == {1: 5.0, 2: 0.0}
    assert trends.bars == {1: "█▅"}
    trends.add({1: 1, 2: 7}, SECOND)  # back in time: begun anew
    assert trends.rates == {}


def test_bars_are_shares_of_the_highest() -> None:
    assert bars([]) == ""
    assert bars([0, 0]) == "  "
    assert bars([0.1, 50, 100]) == "▁▅█"


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.01, "0.1"),
        (0.5, "0.5"),
        (12.3, "12"),
        (9999.0, "9999"),
        (10000.0, "10k"),
        (123456.0, "123k"),
        (1234567.0, "1.2M"),
        (2.5e9, "2.5G"),
    ],
)
def test_rate(rate: float | None, text: str) -> None:
    assert rate_of(rate) == text


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (None, "-"),
        (-5, "-"),
        (340_000, "340 µs"),
        (12_000_000, "12 ms"),
        (1_250_000_000, "1.2 s"),
        (99 * SECOND, "99 s"),
        (100 * SECOND, "1 min"),
        (99 * 60 * SECOND, "99 min"),
        (47 * 3600 * SECOND, "47 h"),
        (48 * 3600 * SECOND, "2 d"),
    ],
)
def test_span(nanoseconds: int | None, text: str) -> None:
    assert span_of(nanoseconds) == text


def test_age_of_what_comes_from_a_faster_clock() -> None:
    assert age_of(snapshots.NOW + SECOND, snapshots.NOW) == "0 s"
    assert age_of(None, snapshots.NOW) == "-"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (4096, "4 KiB"),
        (2 << 20, "2 MiB"),
        (3 << 29, "1.5 GiB"),
        (5, "5 B"),
    ],
)
def test_size(size: int | None, text: str) -> None:
    assert size_of(size) == text


def test_clipping_counts_cells() -> None:
    assert clip("数据库", 6) == "数据库"
    assert clip("数据库", 5) == "数据…"
    assert clip("数据库", 4) == "数…"  # two cells do not fit into what is left
    assert clip("abc", 0) == ""
    assert cells("e\u0301") == 1
    assert pad("数", 4) == "数  "
    assert pad("7", 3, right=True) == "  7"


def test_clipped_line_ends_in_an_ellipsis_and_keeps_styles() -> None:
    line = (("abc", "bad"), ("defgh", "dim"))
    assert clip_line(line, 8) == line
    assert clip_line(line, 5) == (("abc", "bad"), ("d…", "dim"))
    assert plain(clip_line(line, 3)) == "ab…"
