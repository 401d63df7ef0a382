"""One line per event, for people and for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvmtrace import kvm
from kvmtrace.events import (
    KINDS,
    ClockStep,
    Event,
    Exit,
    Found,
    GmemRefusal,
    HwError,
    KernelCounts,
    Lost,
    Owned,
    Owner,
    PageReplaced,
    Poison,
    Reboot,
    Sigbus,
    SoftOffline,
    Tick,
    Unpoison,
    VcpuState,
    VmGone,
    VmSeen,
)
from kvmtrace.model import CorrelatedEvent
from kvmtrace.views.event_lines import LINE_KINDS, EventText, event_text, json_text, kinds_of
from kvmtrace.views.format import cells, rfc3339_of, zone_of
from tests.unit.fake import machine_check

SECOND = 1_000_000_000
TS = 1_790_000_000_123_456_789  # 2026-09-21T14:13:20.123Z
WEB = VmSeen(TS, 1, 4242, "web-1", "11111111-2222-3333-4444-555555555555", "qemu")


@pytest.fixture(autouse=True)
def _zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "XYZ-2")  # two hours east of UTC
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def text(correlated: CorrelatedEvent, width: int | None = None) -> str:
    line = event_text(correlated, width=width)
    assert line is not None
    return line


def fault(**fields: object) -> Exit:
    facts: dict[str, object] = {
        "errno": kvm.EHWPOISON,
        "reason": 39,
        "annotated": True,
        "flags": 8,
        "gpa": 0x1F000000,
        "size": 4096,
        "gfn": 0x1F000,
        "private": True,
        "access": "r",
        "count": 3,
    }
    return Exit(TS, 1, 0, **(facts | fields))  # type: ignore[arg-type]


def test_fault() -> None:
    line = text(CorrelatedEvent(fault(), WEB, "hwpoison", "103275-1"))
    assert line == (
        "16:13:20.123 exit   web-1 (4242)           EHWPOISON hwpoison      vcpu 0"
        "  gpa 0x1f000000  gfn 0x1f000  4 KiB  flags PRIVATE  read  x3  incident 103275-1"
    )


@pytest.mark.parametrize(
    ("errno", "flags", "text_of_flags"),
    [
        (kvm.EFAULT, 0x10, "USERFAULT"),
        (kvm.EFAULT, 0x38, "PRIVATE|USERFAULT|0x20"),
        (kvm.EHWPOISON, 0x10, "0x10"),  # an RFC had HWPOISON there, beside EHWPOISON
    ],
)
def test_bit_4_of_the_flags(errno: int, flags: int, text_of_flags: str) -> None:
    assert f"flags {text_of_flags}  " in text(CorrelatedEvent(fault(errno=errno, flags=flags), WEB))


def test_unannotated_fault_says_only_what_is_known() -> None:
    bare = fault(
        errno=kvm.EFAULT,
        reason=6,
        annotated=False,
        flags=None,
        gpa=None,
        size=None,
        gfn=None,
        private=None,
        access=None,
        count=1,
    )
    assert text(CorrelatedEvent(bare, None, "unannotated")) == (
        "16:13:20.123 exit   -                      EFAULT unannotated      vcpu 0  reason MMIO"
    )


def test_an_exit_counted_without_its_vcpu_and_address() -> None:
    unknown = {"gpa": None, "size": None, "gfn": None, "access": None}
    exit_ = replace(fault(**unknown, count=5000), vcpu=None)
    correlated = CorrelatedEvent(exit_, WEB, "hwpoison")
    assert text(correlated) == (
        "16:13:20.123 exit   web-1 (4242)           EHWPOISON hwpoison      vcpu -"
        "  flags PRIVATE  x5000"
    )
    line = json.loads(json_text(correlated) or "")
    assert not {"vcpu", "gpa", "gfn", "size"} & line.keys()
    assert (line["reason"], line["annotated"], line["cause"]) == (39, True, "hwpoison")
    bare = replace(exit_, reason=None, annotated=None, flags=None, private=None)
    assert text(CorrelatedEvent(bare, WEB)) == (
        "16:13:20.123 exit   web-1 (4242)           EHWPOISON (cause unknown)  vcpu -  x5000"
    )
    line = json.loads(json_text(CorrelatedEvent(bare, WEB)) or "")
    assert not {"vcpu", "reason", "annotated"} & line.keys()


def test_unknown_flags_errno_and_cause_still_print() -> None:
    line = text(CorrelatedEvent(fault(errno=4095, flags=1 << 5), WEB))
    assert "4095 (cause unknown)" in line
    assert "flags 0x20" in line


def test_poison_names_its_owners() -> None:
    poison = Poison(TS, 0x103275, "dirty unevictable LRU page", "Failed")
    one = text(CorrelatedEvent(poison, incident="103275-1", owners=((Owner(1, 0x1F000), WEB),)))
    assert one.startswith("16:13:20.123 poison web-1 (4242)           Failed ")
    assert "pfn 0x103275  dirty unevictable LRU page  owners web-1 (4242) gfn 0x1f000" in one
    assert text(CorrelatedEvent(poison)).endswith("owners none")
    assert "owners web-1 (4242) gfn -, - gfn 0x5" in text(
        CorrelatedEvent(poison, owners=((Owner(1, None), WEB), (Owner(9, 5), None)))
    )


@pytest.mark.parametrize(
    ("correlated", "expected"),
    [
        (
            CorrelatedEvent(Sigbus(TS, 7, 8, 4, 0x7F00, lsb=21, vcpu=2, gfn=0x1F), WEB),
            "sigbus web-1 (4242)           BUS_MCEERR_AR           "
            "vcpu 2  tid 8  hva 0x7f00  2 MiB  gfn 0x1f",
        ),
        (
            CorrelatedEvent(Sigbus(TS, 7, 8, 5, 0x7F00)),
            "sigbus pid 7                  BUS_MCEERR_AO           tid 8  hva 0x7f00",
        ),
        (
            CorrelatedEvent(Sigbus(TS, 7, 8, kvm.SI_KERNEL, None)),
            "sigbus pid 7                  SI_KERNEL               tid 8",
        ),
        (
            CorrelatedEvent(Sigbus(TS, 168, 168, 4, 0x7F00, comm="reader")),
            "sigbus reader (168)           BUS_MCEERR_AR           tid 168  hva 0x7f00",
        ),
        (
            CorrelatedEvent(Sigbus(TS, 7, 8, 5, 0x7F00), VmSeen(TS, 1, 7, "web", vmid="8006")),
            "sigbus 8006 (web) (7)         BUS_MCEERR_AO           tid 8  hva 0x7f00",
        ),
        (
            CorrelatedEvent(
                Owned(TS, 0x104CAA, Owner(1, None, 0x13000), "pagemap"),
                WEB,
                incident="104caa-1",
                owners=((Owner(1, 5, 0x13000), WEB),),
            ),
            "page   web-1 (4242)           owner found             "
            "pfn 0x104caa  gfn 0x5  hva 0x13000  incident 104caa-1",
        ),
        (
            CorrelatedEvent(machine_check(TS, None, None, 5, 3, 1, 0xBD)),
            "mce    -                      bank 5 cpu 3            "
            "socket 1  addr -  pfn -  status 0xbd",
        ),
        (
            CorrelatedEvent(WEB, WEB),
            "vm     web-1 (4242)           seen                    "
            "qemu  uuid 11111111-2222-3333-4444-555555555555",
        ),
        (CorrelatedEvent(VmGone(TS, 1), WEB), "vm     web-1 (4242)           gone"),
        (
            CorrelatedEvent(Lost(TS, "ring", 9)),
            "lost   -                      9 lost                  at ring",
        ),
    ],
)
def test_other_kinds(correlated: CorrelatedEvent, expected: str) -> None:
    assert text(correlated) == f"16:13:20.123 {expected}"


EVERY_KIND: tuple[CorrelatedEvent, ...] = (
    CorrelatedEvent(WEB, WEB),
    CorrelatedEvent(VmGone(TS, 1), WEB),
    CorrelatedEvent(fault(), WEB, "hwpoison", "103275-1"),
    CorrelatedEvent(Poison(TS, 5, "dirty LRU page", "Failed"), incident="5-1"),
    CorrelatedEvent(Owned(TS, 5, Owner(1, 8), "pagemap"), WEB, incident="5-1"),
    CorrelatedEvent(
        Owned(TS, 5, Owner(1, 8, 0x7000), "pagemap"),
        WEB,
        None,
        "5-1",
        ((Owner(1, 8, 0x7000), WEB),),
    ),
    CorrelatedEvent(Sigbus(TS, 4242, 77, 4, 0x7000, 12, vm=1), WEB),
    CorrelatedEvent(machine_check(TS, 0x5000, 5, 7, 3, 0, 0)),
    CorrelatedEvent(GmemRefusal(TS, 1, 8), WEB),
    CorrelatedEvent(HwError(TS, "extlog", "corrected")),
    CorrelatedEvent(SoftOffline(TS, 9, 0)),
    CorrelatedEvent(SoftOffline(TS, 9, 16), incident="9-1"),
    CorrelatedEvent(Unpoison(TS, 5), incident="5-1"),
    CorrelatedEvent(Found(TS, 77), incident="4d-1"),
    CorrelatedEvent(KernelCounts(TS, ())),
    CorrelatedEvent(VcpuState(TS, 1, 77, "running"), WEB),
    CorrelatedEvent(PageReplaced(TS, 1, 5, 0x7000), WEB),
    CorrelatedEvent(Tick(TS)),
    CorrelatedEvent(ClockStep(TS, -SECOND, -SECOND)),
    CorrelatedEvent(Reboot(TS)),
    CorrelatedEvent(Lost(TS, "ring", 7)),
)


@pytest.mark.parametrize(
    ("event", "end"),
    [
        (SoftOffline(TS, 9, 0), "soft-offlined           pfn 0x9"),
        (SoftOffline(TS, 9, 16), "soft offline refused: EBUSY  pfn 0x9"),
        (VmSeen(TS, 1, 7, "web", unread="its memory map hangs"), "  its memory map hangs"),
        (ClockStep(TS, -SECOND // 2, 0, 90 * SECOND), "  host suspended for 90 s"),
    ],
)
def test_what_a_line_ends_in(event: Event, end: str) -> None:
    assert text(CorrelatedEvent(event)).endswith(end)


def test_a_vm_that_was_not_looked_up_says_why_as_json() -> None:
    line = json_text(CorrelatedEvent(VmSeen(TS, 1, 7, unread="its memory map hangs")))
    assert json.loads(line or "")["unread"] == "its memory map hangs"
    assert "unread" not in json.loads(json_text(CorrelatedEvent(VmSeen(TS, 1, 7))) or "")


def test_programs_learn_the_vmm_that_people_are_shown() -> None:
    assert " qemu" in text(CorrelatedEvent(WEB))
    assert json.loads(json_text(CorrelatedEvent(WEB)) or "")["vmm"] == "qemu"


@pytest.mark.parametrize(
    ("name", "vm"),
    [
        ("shop", "8006 (shop) (4003)"),
        (None, "8006 (pid 4003)"),
        ("s" * 30, "8006 (ssssssss… (4003)"),
    ],
)
def test_proxmox_s_number_is_written_as_everywhere(name: str | None, vm: str) -> None:
    assert f" {vm} " in text(CorrelatedEvent(VmSeen(TS, 1, 4003, name, vmid="8006")))


def test_text_and_json_have_the_same_events() -> None:
    assert {type(correlated.event) for correlated in EVERY_KIND} == set(KINDS.values())
    for correlated in EVERY_KIND:
        line, shown = json_text(correlated), event_text(correlated)
        assert (line is None) == (shown is None), correlated
        if line is not None:
            record = json.loads(line)
            assert record["kind"]
            assert record.get("incident") == correlated.incident
            assert (shown or "").endswith(
                f"incident {correlated.incident}" if correlated.incident else ""
            )


@pytest.mark.parametrize(
    ("correlated", "record"),
    [
        (
            EVERY_KIND[5],
            {
                "kind": "owner",
                "pfn": 5,
                "vm": {"pid": 4242, "name": "web-1", "uuid": WEB.uuid},
                "gfn": 8,
                "hva": 0x7000,
                "via": "pagemap",
                "incident": "5-1",
            },
        ),
        (CorrelatedEvent(SoftOffline(TS, 9, 0)), {"kind": "soft_offline", "pfn": 9}),
        (
            CorrelatedEvent(SoftOffline(TS, 9, 16)),
            {"kind": "soft_offline", "pfn": 9, "errno": "EBUSY"},
        ),
        (CorrelatedEvent(Unpoison(TS, 5)), {"kind": "unpoison", "pfn": 5}),
        (CorrelatedEvent(Found(TS, 77)), {"kind": "found", "pfn": 77}),
    ],
)
def test_what_happens_to_a_page_as_json(
    correlated: CorrelatedEvent, record: dict[str, object]
) -> None:
    line = json.loads(json_text(correlated) or "null")
    assert line == {"ts": "2026-09-21T14:13:20.123456789Z"} | record


@pytest.mark.parametrize("event", [Tick(TS), Owned(TS, 1, Owner(1, 2), "pagemap")])
def test_internal_events_have_no_line(event: Event) -> None:
    assert event_text(CorrelatedEvent(event)) is None
    assert json_text(CorrelatedEvent(event)) is None


def test_long_and_wide_names_keep_the_columns() -> None:
    for name in ("x" * 100, "数据库" * 20):
        line = text(CorrelatedEvent(VmGone(TS, 1), VmSeen(TS, 1, 4242, name)))
        before = line[: line.index(" gone")]
        assert before.rstrip().endswith("… (4242)")
        assert cells(before) == 12 + 1 + 6 + 1 + 22


def test_width_cuts_in_cells() -> None:
    wide = VmSeen(TS, 1, 4242, "数据库")
    line = text(CorrelatedEvent(fault(), wide, "hwpoison"), width=60)
    assert cells(line) == 60
    assert line.endswith("…")


def test_json_is_the_contract_in_one_compact_line() -> None:
    line = json_text(
        CorrelatedEvent(fault(), VmSeen(TS, 1, 4242, "数据库"), "hwpoison", "103275-1")
    )
    assert line is not None
    assert "\n" not in line
    assert '"name":"数据库"' in line
    record = json.loads(line)
    assert record["ts"] == "2026-09-21T14:13:20.123456789Z"
    assert record["gfn"] == 0x1F000
    assert record["vm"] == {"pid": 4242, "name": "数据库"}


@pytest.mark.parametrize(
    ("signal", "vm", "who"),
    [
        (
            Sigbus(TS, 168, 169, 4, 0x7F00, comm="cat"),
            None,
            ("process", {"pid": 168, "name": "cat"}),
        ),
        (Sigbus(TS, 168, 169, 4, 0x7F00), None, ("process", {"pid": 168})),
        (
            Sigbus(TS, 7, 8, 4, 0x7F00, vm=1),
            VmSeen(TS, 1, 7, "web"),
            ("vm", {"pid": 7, "name": "web"}),
        ),
        (
            Sigbus(TS, 7, 8, 4, 0x7F00, vm=1),
            VmSeen(TS, 1, 7, "web", vmid="8006"),
            ("vm", {"pid": 7, "name": "web", "vmid": "8006"}),
        ),
    ],
)
def test_a_signal_is_to_a_vm_or_to_a_process(
    signal: Sigbus, vm: VmSeen | None, who: tuple[str, dict[str, object]]
) -> None:
    line = json.loads(json_text(CorrelatedEvent(signal, vm)) or "")
    assert {key: line[key] for key in ("vm", "process") if key in line} == dict([who])


def test_each_line_has_its_date_and_zone_in_a_pipe() -> None:
    lines = EventText(dated=True).lines(CorrelatedEvent(VmGone(TS, 1), WEB))
    assert lines == ["2026-09-21T16:13:20.123+02:00 vm     web-1 (4242)           gone"]


def test_the_date_stands_once_a_day_on_a_terminal() -> None:
    printer = EventText(dated=False)
    day = 86400 * SECOND
    lines = [printer.lines(CorrelatedEvent(VmGone(TS + n * day // 2, 1), WEB)) for n in range(4)]
    assert [len(one) for one in lines] == [2, 2, 1, 2]
    assert lines[0] == [
        "-- 2026-09-21, UTC+02:00",
        "16:13:20.123 vm     web-1 (4242)           gone",
    ]
    assert lines[1][0] == "-- 2026-09-22, UTC+02:00"
    assert printer.lines(CorrelatedEvent(Tick(TS))) == []


@pytest.mark.parametrize(
    ("zone", "shown", "stamp"),
    [
        ("UTC0", "UTC", "14:13:20.123Z"),
        ("IST-5:30", "UTC+05:30", "19:43:20.123+05:30"),
        ("NST3:30", "UTC-03:30", "10:43:20.123-03:30"),
    ],
)
def test_zones(monkeypatch: pytest.MonkeyPatch, zone: str, shown: str, stamp: str) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    assert zone_of(TS) == shown
    assert rfc3339_of(TS) == f"2026-09-21T{stamp}"


def test_kinds_are_those_of_json() -> None:
    for correlated in (
        CorrelatedEvent(fault(), WEB),
        CorrelatedEvent(Poison(TS, 1, "a", "b")),
        CorrelatedEvent(Owned(TS, 1, Owner(1, 2), "pagemap"), owners=((Owner(1, 2), WEB),)),
        CorrelatedEvent(SoftOffline(TS, 1, 0)),
        CorrelatedEvent(Found(TS, 1)),
        CorrelatedEvent(Unpoison(TS, 1)),
        CorrelatedEvent(machine_check(TS, None, None, 1, 2, 3, 4)),
        CorrelatedEvent(VmGone(TS, 1), WEB),
        CorrelatedEvent(Lost(TS, "ring", 1)),
        CorrelatedEvent(ClockStep(TS, 1, 1)),
        CorrelatedEvent(Reboot(TS)),
        CorrelatedEvent(Sigbus(TS, 1, 1, 4, 0)),
    ):
        line = json.loads(json_text(correlated) or "")
        assert line["kind"] == kinds_of(correlated.event)[0]
        assert set(kinds_of(correlated.event)) <= set(LINE_KINDS)


def test_what_was_there_is_marked() -> None:
    line = json.loads(json_text(CorrelatedEvent(WEB, WEB), before=True) or "")
    assert line["before"] is True
