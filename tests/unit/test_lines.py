"""One line per event, for people and for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvmtrace import kvm
from kvmtrace.correlate import Told
from kvmtrace.events import (
    Event,
    Exit,
    GmemPoison,
    Lost,
    Mce,
    Owned,
    Owner,
    Poison,
    Sigbus,
    VmGone,
    VmSeen,
)
from kvmtrace.views.cells import cells
from kvmtrace.views.lines import event_text, json_text

TS = 1_790_000_000_123_456_789  # 2026-09-21T14:13:20.123Z
WEB = VmSeen(TS, 1, 4242, "web-1", "11111111-2222-3333-4444-555555555555", "qemu")


@pytest.fixture(autouse=True)
def _zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "XYZ-2")  # two hours east of UTC
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def text(told: Told, **options: int) -> str:
    line = event_text(told, **options)
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
    line = text(Told(fault(), WEB, "hwpoison", "103275-1"))
    assert line == (
        "16:13:20.123 exit   web-1 (4242)           EHWPOISON hwpoison      vcpu 0"
        "  gpa 0x1f000000  gfn 0x1f000  4 KiB  flags PRIVATE  read  x3  incident 103275-1"
    )


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
    assert text(Told(bare, None, "unannotated")) == (
        "16:13:20.123 exit   -                      EFAULT unannotated      vcpu 0  reason MMIO"
    )


def test_an_exit_counted_without_its_vcpu_and_address() -> None:
    unknown = {"gpa": None, "size": None, "gfn": None, "access": None}
    exit_ = replace(fault(**unknown, count=5000), vcpu=None)
    told = Told(exit_, WEB, "hwpoison")
    assert text(told) == (
        "16:13:20.123 exit   web-1 (4242)           EHWPOISON hwpoison      vcpu -"
        "  flags PRIVATE  x5000"
    )
    line = json.loads(json_text(told) or "")
    assert not {"vcpu", "gpa", "gfn", "size"} & line.keys()
    assert (line["reason"], line["annotated"], line["cause"]) == (39, True, "hwpoison")
    bare = replace(exit_, reason=None, annotated=None, flags=None, private=None)
    assert text(Told(bare, WEB)) == (
        "16:13:20.123 exit   web-1 (4242)           EHWPOISON (cause unknown)  vcpu -  x5000"
    )
    line = json.loads(json_text(Told(bare, WEB)) or "")
    assert not {"vcpu", "reason", "annotated"} & line.keys()


def test_unknown_flags_errno_and_cause_still_print() -> None:
    line = text(Told(fault(errno=4095, flags=1 << 5), WEB))
    assert "4095 (cause unknown)" in line
    assert "flags 0x20" in line


def test_poison_names_its_owners() -> None:
    poison = Poison(TS, 0x103275, "dirty unevictable LRU page", "Failed")
    one = text(Told(poison, incident="103275-1", owners=((Owner(1, 0x1F000), WEB),)))
    assert one.startswith("16:13:20.123 poison web-1 (4242)           Failed ")
    assert "pfn 0x103275  dirty unevictable LRU page  owners web-1 (4242) gfn 0x1f000" in one
    assert text(Told(poison)).endswith("owners none")
    assert "owners web-1 (4242) gfn -, - gfn 0x5" in text(
        Told(poison, owners=((Owner(1, None), WEB), (Owner(9, 5), None)))
    )


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            Told(Sigbus(TS, 7, 8, 4, 0x7F00, lsb=21, vcpu=2, gfn=0x1F), WEB),
            "sigbus web-1 (4242)           BUS_MCEERR_AR           "
            "vcpu 2  tid 8  hva 0x7f00  2 MiB  gfn 0x1f",
        ),
        (
            Told(Sigbus(TS, 7, 8, 5, 0x7F00)),
            "sigbus pid 7                  BUS_MCEERR_AO           tid 8  hva 0x7f00",
        ),
        (
            Told(Sigbus(TS, 7, 8, kvm.SI_KERNEL, None)),
            "sigbus pid 7                  SI_KERNEL               tid 8",
        ),
        (
            Told(
                Owned(TS, 0x104CAA, Owner(1, None, 0x13000), "pagemap"),
                WEB,
                incident="104caa-1",
                owners=((Owner(1, 5, 0x13000), WEB),),
            ),
            "page   web-1 (4242)           owner found             "
            "pfn 0x104caa  gfn 0x5  hva 0x13000  incident 104caa-1",
        ),
        (
            Told(Mce(TS, None, None, 5, 3, 1, 0xBD)),
            "mce    -                      bank 5 cpu 3            "
            "socket 1  addr -  pfn -  status 0xbd",
        ),
        (
            Told(WEB, WEB),
            "vm     web-1 (4242)           seen                    "
            "qemu  uuid 11111111-2222-3333-4444-555555555555",
        ),
        (Told(VmGone(TS, 1), WEB), "vm     web-1 (4242)           gone"),
        (
            Told(Lost(TS, "ring", 9)),
            "lost   -                      9 lost                  at ring",
        ),
    ],
)
def test_other_kinds(told: Told, expected: str) -> None:
    assert text(told) == f"16:13:20.123 {expected}"


@pytest.mark.parametrize("event", [GmemPoison(TS, 1, 2, 3), Owned(TS, 1, Owner(1, 2), "pagemap")])
def test_internal_events_have_no_line(event: Event) -> None:
    assert event_text(Told(event)) is None
    assert json_text(Told(event)) is None


def test_long_and_wide_names_keep_the_columns() -> None:
    for name in ("x" * 100, "数据库" * 20):
        line = text(Told(VmGone(TS, 1), VmSeen(TS, 1, 4242, name)))
        before = line[: line.index(" gone")]
        assert before.rstrip().endswith("… (4242)")
        assert cells(before) == 12 + 1 + 6 + 1 + 22


def test_width_cuts_in_cells() -> None:
    wide = VmSeen(TS, 1, 4242, "数据库")
    line = text(Told(fault(), wide, "hwpoison"), width=60)
    assert cells(line) == 60
    assert line.endswith("…")


def test_json_is_the_contract_in_one_compact_line() -> None:
    line = json_text(Told(fault(), VmSeen(TS, 1, 4242, "数据库"), "hwpoison", "103275-1"))
    assert line is not None
    assert "\n" not in line
    assert '"name":"数据库"' in line
    record = json.loads(line)
    assert record["ts"] == "2026-09-21T14:13:20.123456789Z"
    assert record["gfn"] == 0x1F000
    assert record["vm"] == {"pid": 4242, "name": "数据库"}
