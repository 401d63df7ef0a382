"""Where an error comes from, by whatever hardware and firmware say of it: field cases."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvmtrace.correlate import Correlator
from kvmtrace.correlate.limits import Limits
from kvmtrace.enrich.machine_checks import MachineChecks
from kvmtrace.events import Event, HwError, Poison
from kvmtrace.judgement.actions import next_steps
from kvmtrace.linux import cper, mce, smbios
from kvmtrace.linux.smbios import Firmware
from kvmtrace.model import Incident, Origin, Snapshot
from kvmtrace.sources.bpf import records
from kvmtrace.sources.bpf.hardware import HW_EXTLOG, HW_MC_EVENT, HwRecord, MceRecord
from kvmtrace.sources.bpf.translator import BpfTranslator
from kvmtrace.sources.ftrace import hardware
from kvmtrace.sources.ftrace.records import Record
from kvmtrace.views import explain, not_known
from kvmtrace.views.json_output import event_line
from tests.unit.test_ftrace_hardware import table

T = 1_790_000_000_000_000_000
MS, S = 1_000_000, 1_000_000_000
ADDR = 0x7E025E400
INTEL, AMD = mce.INTEL, mce.AMD[0]
EDAC_DIMM, BOARD_DIMM = "CPU_SrcID#0_MC#3_Chan#0_DIMM#0", "NODE 3 CPU0_DIMM_G1"
FIRMWARE = Firmware({0x42: BOARD_DIMM}, cper.GHES)
# Severities of GHES and EDAC
CORRECTED, RECOVERABLE = 1, 2
EDAC_CORRECTED, EDAC_FATAL = 0, 3
SRAR, UCNA, FAKED, CONTROLLER = (
    0xBD80000000100134,
    0xAC00000200A00090,
    0xB40000000000009F,
    0x9C00004001010090,
)
TWICE = ((0x10, "A1"), (0x11, "B1"), (0x10, "C1"))
MISC = 0x86  # physical, exact to 64 bytes


def check(ts: int, bank: int, status: int, addr: int = ADDR, **more: Any) -> Event:
    fields = {"common_pid": 1, "bank": bank, "cpu": 0, "socketid": 0, "status": status}
    fields |= {"addr": addr, "misc": MISC, "ipid": 0} | more
    return hardware.machine_check(Record(ts, "mce", fields))


def edac(ts: int, label: str, severity: int = EDAC_CORRECTED, **more: Any) -> HwError:
    fields: dict[str, Any] = {"common_pid": 1, "error_type": severity, "msg": "memory read error"}
    fields |= {"label": label, "error_count": 1, "address": ADDR, "grain_bits": 5} | more
    return hardware.error(Record(ts, "mc_event", fields), FIRMWARE)


def ghes(ts: int, handle: int | None, severity: int = CORRECTED, addr: int = ADDR) -> HwError:
    kind = 4 | (handle or 0) << 48
    valid = 1 << 1 | 1 << 14 | (0 if handle is None else 1 << 17)
    fields = {"common_pid": 1, "sev": severity, "valid": valid, "addr": addr, "kind": kind}
    return hardware.error(Record(ts, "apei", fields), FIRMWARE)


def poison(ts: int, addr: int = ADDR) -> Poison:
    return Poison(ts, addr >> 12, "dirty LRU page", "Recovered", None, None, 31)


def told(tmp_path: Path, events: Sequence[Event], vendor: str = INTEL) -> Snapshot:
    """As a live command has it, on a host whose CPU is of this vendor."""
    (tmp_path / "cpuinfo").write_text(
        f"vendor_id\t: {vendor}\naddress sizes\t: 46 bits physical, 57 bits virtual\n"
    )
    correlator = Correlator()
    for event in MachineChecks(str(tmp_path)).process(list(events), T):
        correlator.feed(event)
    return correlator.snapshot()


def only(snapshot: Snapshot) -> Incident:
    (incident,) = snapshot.incidents
    return incident


def origin_of(snapshot: Snapshot) -> Origin:
    origin = only(snapshot).origin
    assert origin is not None
    return origin


def next_of(snapshot: Snapshot) -> str:
    return " ".join(next_steps(only(snapshot)))


# -- which DIMM


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("handle", [0, 0x4242, 0xFFFF, None])
def test_a_handle_that_smbios_lacks_is_no_dimm(
    tmp_path: Path, handle: int | None, order: tuple[int, ...]
) -> None:
    reports = (edac(T, EDAC_DIMM, EDAC_FATAL), ghes(T, handle, RECOVERABLE), poison(T))
    snapshot = told(tmp_path, [reports[n] for n in order])
    assert origin_of(snapshot).label == EDAC_DIMM
    assert f"replace {EDAC_DIMM}" in next_of(snapshot)
    assert list(snapshot.dimms) == [EDAC_DIMM]
    alone = told(tmp_path, [reports[1], poison(T)])
    assert origin_of(alone).label is None
    if handle is not None:
        assert f"SMBIOS handle {handle:#x}, which names no DIMM" in (origin_of(alone).message or "")


@pytest.mark.parametrize("label", ["unknown memory", "any memory", "", "Not Specified"])
def test_placeholders_name_no_dimm(tmp_path: Path, label: str) -> None:
    snapshot = told(tmp_path, [edac(T, label, EDAC_FATAL), poison(T)])
    assert origin_of(snapshot).label is None
    assert snapshot.dimms == {}
    assert next_of(snapshot) == f"find the DIMM that holds address {ADDR:#x}: no report named it"
    assert "which DIMM: no report with this address named one" in not_known.not_known(
        only(snapshot), snapshot
    )
    # A recording of kvmtrace 0.1 has them as labels.
    old = HwError(T, "ras:mc_event", "fatal", ADDR, ADDR >> 12, label=label)
    assert told(tmp_path, [old, poison(T)]).dimms == {}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_best_name_stays(tmp_path: Path, order: tuple[int, ...]) -> None:
    """EDAC's before SMBIOS's before FRU text, and they are one DIMM, in any order."""
    extlog = hardware.error(
        Record(T, "extlog", {"sev": 0, "pa": ADDR, "pa_mask_lsb": 6, "fru_text": "DIMM G1"}),
        FIRMWARE,
    )
    reports = (edac(T, EDAC_DIMM), ghes(T, 0x42, RECOVERABLE), extlog)
    for number, best in ((3, EDAC_DIMM), (2, BOARD_DIMM), (1, "DIMM G1")):
        kept = [reports[n] for n in order if n >= len(reports) - number]
        snapshot = told(tmp_path, [*kept, poison(T)])
        assert origin_of(snapshot).label == best
        assert list(snapshot.dimms) == [best]


def test_another_address_is_another_dimm_s(tmp_path: Path) -> None:
    """Controllers take turns within a page: a page is not of one DIMM."""
    reports = [edac(T, EDAC_DIMM), ghes(T + 5 * S, 0x42, addr=ADDR + 0x100)]
    assert set(told(tmp_path, reports).dimms) == {EDAC_DIMM, BOARD_DIMM}


@pytest.mark.parametrize("better", [True, False])
def test_a_corrected_error_of_another_line_names_no_uncorrected_one(
    tmp_path: Path, *, better: bool
) -> None:
    """Lines of a page are of several DIMMs: neither worth nor order decides."""
    of_other = edac(T, EDAC_DIMM, address=ADDR + 0x100)
    lost = ghes(T + 60 * S, 0x42, RECOVERABLE) if better else check(T + 60 * S, 1, SRAR)
    later = edac(T + 120 * S, EDAC_DIMM, address=ADDR + 0x140)
    label = BOARD_DIMM if better else None
    for events in ([of_other, lost], [lost, later], [of_other, lost, later]):
        snapshot = told(tmp_path, [*events, poison(T + 121 * S)])
        assert origin_of(snapshot).label == label
        assert (f"replace {BOARD_DIMM}" in next_of(snapshot)) == better
        assert EDAC_DIMM not in next_of(snapshot)
    same_line = edac(T, EDAC_DIMM)
    snapshot = told(tmp_path, [same_line, of_other, lost, poison(T + 121 * S)])
    assert origin_of(snapshot).label == EDAC_DIMM


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (2, 0, 1)])
def test_a_report_of_a_range_is_not_of_this_page(tmp_path: Path, order: tuple[int, ...]) -> None:
    """Firmware that knows no more than a GiB names an address, and a DIMM, of another page."""
    wide = {"mask": ~((1 << 30) - 1) & (1 << 64) - 1, "addr": ADDR ^ 1 << 20}
    valid = {"valid": 1 << 1 | 1 << 2 | 1 << 17, "kind": 0x42 << 48}
    fields = {"common_pid": 1, "sev": CORRECTED + RECOVERABLE} | wide | valid
    reports = (
        hardware.error(Record(T, "apei", fields), FIRMWARE),
        edac(T + 60 * S, "DIMM_A1", 2),
        poison(T + 60 * S),
    )
    origin = origin_of(told(tmp_path, [reports[n] for n in order]))
    assert (origin.addr, origin.label, origin.severity) == (ADDR, "DIMM_A1", "deferred")


def test_what_says_nothing_of_its_severity_is_no_reason_to_replace_a_dimm(tmp_path: Path) -> None:
    informational = (edac(T, EDAC_DIMM, 4), ghes(T, 0x42, 0))
    for report in informational:
        snapshot = told(tmp_path, [report, poison(T + S)])
        assert next_of(snapshot).startswith("watch ")


def test_errors_of_two_lines_at_once_are_not_of_one_dimm(tmp_path: Path) -> None:
    """Or each later error of the one would have the name of the other."""
    storm = [edac(T, EDAC_DIMM), ghes(T + 300 * MS, 0x42, addr=ADDR + 0x100)]
    elsewhere = ghes(T + 60 * S, 0x42, RECOVERABLE, ADDR + 0x5000)
    snapshot = told(tmp_path, [*storm, elsewhere, poison(T + 61 * S, ADDR + 0x5000)])
    assert origin_of(snapshot).label == BOARD_DIMM
    page_only = ghes(T + 60 * S, 0x42, RECOVERABLE, ADDR & ~0xFFF)
    snapshot = told(tmp_path, [storm[0], page_only, poison(T + 61 * S)])
    assert origin_of(snapshot).label == BOARD_DIMM
    assert set(snapshot.dimms) == {EDAC_DIMM, BOARD_DIMM}


def test_firmware_that_knows_the_page_only_means_the_same_error(tmp_path: Path) -> None:
    reports = [edac(T, EDAC_DIMM), ghes(T + 5 * MS, 0x42, addr=ADDR & ~0xFFF)]
    assert set(told(tmp_path, reports).dimms) == {EDAC_DIMM}


def test_a_handle_of_two_dimms_names_neither(tmp_path: Path) -> None:
    devices = [(17, handle, bytes(12) + b"\x01" + bytes(5), [name]) for handle, name in TWICE]
    path = tmp_path / "DMI"
    path.write_bytes(table(*devices))
    assert smbios.dimm_labels(str(path)) == {0x11: "B1"}


def test_two_dimms_of_one_name_stay_two(tmp_path: Path) -> None:
    names = ["Channel-0-DIMM-0", "BANK 0"]
    device = bytes(12) + b"\x01\x02" + bytes(4)
    content = table(
        (17, 0x10, device, names), (17, 0x11, device, names), (17, 0x12, device, ["A1"])
    )
    where = tmp_path / "firmware/dmi/tables"
    where.mkdir(parents=True)
    (where / "DMI").write_bytes(content)
    known = smbios.read(str(tmp_path))
    assert known.dimms == {
        0x10: "BANK 0 Channel-0-DIMM-0 (SMBIOS handle 0x10)",
        0x11: "BANK 0 Channel-0-DIMM-0 (SMBIOS handle 0x11)",
        0x12: "A1",
    }
    # EDAC takes its names from there, too (ghes_edac), and distinguishes them by their places.
    reports = [
        hardware.error(
            Record(
                T + n,
                "mc_event",
                {
                    "error_type": 0,
                    "label": "BANK 0 Channel-0-DIMM-0",
                    "error_count": 1,
                    "address": ADDR + n * 4096,
                    "grain_bits": 6,
                    "mc_index": 0,
                    "top_layer": n,
                    "middle_layer": -1,
                    "lower_layer": -1,
                },
            ),
            known,
        )
        for n in range(2)
    ]
    assert [report.label for report in reports] == [
        "BANK 0 Channel-0-DIMM-0 (mc 0, 0)",
        "BANK 0 Channel-0-DIMM-0 (mc 0, 1)",
    ]


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("mc#0csrow#2channel#1", "find the DIMM that holds rank mc#0csrow#2channel#1"),
        ("csrow2channel1", "find the DIMM that holds rank csrow2channel1"),
        ("mc#0channel#1", "find the DIMM on channel mc#0channel#1"),
        ("mc#0branch#0channel#1slot#2", "find the DIMM in slot mc#0branch#0channel#1slot#2"),
        ("DIMM_A1 or DIMM_A2", "find out which DIMM fails, one of DIMM_A1, DIMM_A2"),
        ("CPU_SrcID#0_HBMC#1_Chan#0", "memory without a slot, CPU_SrcID#0_HBMC#1_Chan#0"),
    ],
)
def test_what_is_no_dimm_is_not_replaced(tmp_path: Path, label: str, says: str) -> None:
    snapshot = told(tmp_path, [edac(T, label, EDAC_FATAL), poison(T)])
    assert origin_of(snapshot).label == label
    assert says in next_of(snapshot)
    assert "replace" not in next_of(snapshot).split()
    missing = not_known.not_known(only(snapshot), snapshot)
    assert "which DIMM: no report with this address named one" in missing
    better = told(tmp_path, [edac(T, label, EDAC_FATAL), ghes(T, 0x42), poison(T)])
    assert origin_of(better).label == BOARD_DIMM


@pytest.mark.parametrize("label", ["any memory", "unknown memory", "mc#0memory#0", ""])
def test_what_names_no_place_is_not_told(tmp_path: Path, label: str) -> None:
    snapshot = told(tmp_path, [edac(T, label, EDAC_FATAL), poison(T)])
    assert origin_of(snapshot).label is None
    assert snapshot.dimms == {}
    assert "find the DIMM that holds address" in next_of(snapshot)


def test_amd_s_umc_names_its_dimm(tmp_path: Path) -> None:
    """By FRU text; its address is within the controller's memory and names no page."""
    text = b"P0 CHANNEL A D0\0"
    for fru, dimms in ((text, []), (b"P0 DIMM_A1\0\0\0\0\0\0", ["P0 DIMM_A1"])):
        status = 0xDC2030000000011B | 1 << 53
        event = check(T, 15, status, ipid=0x9600050F00, v_data=fru)
        snapshot = told(tmp_path, [event, poison(T)], AMD)
        assert list(snapshot.dimms) == dimms
        assert only(snapshot).origin is None
        core = check(T, 0, status, ipid=0xB000000000, v_data=fru)
        assert told(tmp_path, [core], AMD).dimms == {}


def test_edac_s_rank_is_the_dimm_that_the_umc_names(tmp_path: Path) -> None:
    rank, fru = "mc#0csrow#2channel#1", b"P0 DIMM_A1\0\0\0\0\0\0"
    events: list[Event] = []
    for n in range(2):
        at = T + n * 60 * S
        status = 0x9C2040000000011B
        events += [check(at, 15, status, 0x1000, ipid=0x9600050F00, v_data=fru), edac(at + 1, rank)]
    snapshot = told(tmp_path, [*events, poison(T + 61 * S)], AMD)
    assert origin_of(snapshot).label == "P0 DIMM_A1"
    assert {label: dimm.count for label, dimm in snapshot.dimms.items()} == {"P0 DIMM_A1": 2}


def test_errors_without_an_address_are_the_dimm_s_as_well(tmp_path: Path) -> None:
    known = [edac(T + n * 60 * S, EDAC_DIMM, address=ADDR + n * 4096) for n in range(3)]
    vague = [edac(T + n * 60 * S, EDAC_DIMM, address=0) for n in range(4, 6)]
    assert told(tmp_path, [*known, *vague]).dimms[EDAC_DIMM].count == 5


def test_a_dimm_that_was_forgotten_has_no_negative_count() -> None:
    correlator = Correlator(Limits(places=1))
    events = [edac(T, EDAC_DIMM), edac(T + 1, "DIMM_B1", address=0), poison(T + 1)]
    for event in [*events, ghes(T + 2, None, RECOVERABLE), ghes(T + 3, 0x42, RECOVERABLE)]:
        correlator.feed(event)
    correlator.feed(edac(T + 4, EDAC_DIMM, EDAC_FATAL))
    assert all(0 <= dimm.corrected <= dimm.count for dimm in correlator.snapshot().dimms.values())


def test_a_flood_of_corrected_errors_pushes_out_no_other(tmp_path: Path) -> None:
    flood = [edac(T + n, EDAC_DIMM, address=n << 12) for n in range(1, 3000)]
    events = [edac(T, "DIMM_A1", EDAC_FATAL), *flood, poison(T + 4000)]
    assert origin_of(told(tmp_path, events)).label == "DIMM_A1"
    fatal = [edac(T + n, EDAC_DIMM, EDAC_FATAL, address=n << 12) for n in range(1, 3000)]
    assert only(told(tmp_path, [*fatal, poison(T + 4000, 2999 << 12)])).origin is not None


# -- extlog, by both sources


def by_bpf(record: HwRecord | MceRecord) -> Any:
    translator = BpfTranslator(0, ({}, {}), "/nonexistent")
    translator._hardware._firmware = FIRMWARE
    (event,) = translator.translate([bytes(record)], None)  # type: ignore[arg-type]
    return event


@pytest.mark.parametrize(
    ("text", "handle", "label", "message"),
    [
        ("Card01, ChnG, DIMM0", None, "Card01, ChnG, DIMM0", "multi-bit ECC"),
        ("CorrectedErr", None, None, "multi-bit ECC, CorrectedErr"),
        ("Card01, ChnG, DIMM0", 0x42, BOARD_DIMM, "multi-bit ECC, Card01, ChnG, DIMM0"),
        ("", None, None, "multi-bit ECC"),
    ],
)
def test_extlog_s_fru_text(text: str, handle: int | None, label: str | None, message: str) -> None:
    valid = 1 << 1 | 1 << 2 | 1 << 14 | (0 if handle is None else 1 << 17)
    data = valid.to_bytes(8, "little") + bytes(44) + (handle or 0).to_bytes(2, "little") + bytes(2)
    said = {"etype": 3, "sev": 2, "pa": ADDR, "pa_mask_lsb": 6, "fru_text": text, "data": data}
    event = hardware.error(Record(T, "extlog", said), FIRMWARE)
    record = HwRecord(via=HW_EXTLOG, valid=valid, addr=ADDR, severity=2, count=1)
    record.mask, record.kind = (1 << 64) - 64, 3 | (handle or 0) << 48
    record.h.type, record.h.ts, record.label = records.HW, T, text.encode()
    assert by_bpf(record) == event
    assert (event.label, event.message) == (label, message)
    assert (event.addr, event.grain, event.severity) == (ADDR, 64, "corrected")


@pytest.mark.parametrize(("bits", "grain"), [(0, 1), (12, 4096), (63, 1 << 63), (64, None)])
def test_a_grain_of_any_size(bits: int, grain: int | None) -> None:
    record = HwRecord(via=HW_MC_EVENT, valid=ADDR, addr=ADDR, grain_bits=bits)
    record.count, record.place = 2, 0xFFFF0100
    record.h.type, record.h.ts, record.label, record.message = records.HW, T, b"A1", b"memory read"
    event = edac(T, "A1", error_count=2, grain_bits=bits, msg="memory read")
    assert event == by_bpf(record)
    assert event.grain == grain


def test_a_list_of_names_that_is_cut_off_says_so() -> None:
    record = HwRecord(via=HW_MC_EVENT, count=1)
    record.h.type, record.label = records.HW, (b"mc#0csrow#2channel#1 or " * 8)[:95]
    assert by_bpf(record).label.endswith("…")


def test_a_machine_check_by_both_sources() -> None:
    status, data = 0x9C20400000000117, b"DIMM_A1\0\0\0\0\0\0\0\0\0"
    record = MceRecord(status=status, addr=ADDR, misc=MISC, bank=15, ipid=0x9600150F00)
    record.h.type, record.h.ts, record.vendor_data = records.MCE, T, (*data,)
    event = check(T, 15, status, ipid=0x9600150F00, v_data=data)
    assert by_bpf(record) == event
    assert isinstance(event, HwError)
    assert event.check is not None
    assert (event.check.ipid, event.check.fru) == (0x9600150F00, "DIMM_A1")
    bare = check(T, 15, status)
    assert isinstance(bare, HwError)
    assert bare.check is not None
    assert (bare.check.ipid, bare.check.fru) == (None, None)


# -- whose socket


@pytest.mark.parametrize("status", [SRAR, SRAR ^ 0x134 ^ 0x150])
@pytest.mark.parametrize("known", [True, False])
def test_who_consumed_it_is_not_where_it_is(tmp_path: Path, status: int, *, known: bool) -> None:
    first = [check(T, 7, CONTROLLER, cpu=0, socketid=0)] if known else []
    consumer = check(T + 1, 1, status, cpu=45, socketid=1)
    snapshot = told(tmp_path, [*first, consumer, poison(T + 2)])
    origin = origin_of(snapshot)
    assert origin.socket == (0 if known else None)
    assert (origin.consumer_cpu, origin.consumer_socket) == (45, 1)
    where = " of socket 0" if known else ""
    assert f"find the DIMM{where} that holds address {ADDR:#x}" in next_of(snapshot)
    assert "consumed by CPU 45, socket 1" in explain.explain_text(only(snapshot), snapshot, 300)
    told_json = explain.as_object(only(snapshot), snapshot)["origin"]
    assert told_json.get("socket") == (0 if known else None)
    assert told_json["consumer_socket"] == 1


def test_who_reads_a_record_is_not_where_it_is(tmp_path: Path) -> None:
    faked = check(T, mce.FIRMWARE_BANK, FAKED, cpu=45, socketid=1)
    origin = origin_of(told(tmp_path, [faked, poison(T)]))
    assert (origin.socket, origin.cpu, origin.bank, origin.consumer_cpu) == (None,) * 4


@pytest.mark.parametrize(
    ("status", "at"), [(CONTROLLER, "memory"), (SRAR, "consumer"), (0x9C00004000000E0B, None)]
)
def test_events_say_what_the_socket_is(tmp_path: Path, status: int, at: str | None) -> None:
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {INTEL}\n")
    (event,) = MachineChecks(str(tmp_path)).process([check(T, 7, status)], T)
    line = event_line(Correlator().feed(event))
    assert line is not None
    assert line.get("at") == at


# -- how many


def one_error(severity: int) -> list[Event]:
    """What one error makes banks, firmware and EDAC report: the chain of an uncorrected one."""
    return [
        check(T + 1, 1, SRAR, cpu=3),
        ghes(T + 6, 0x42, severity),
        poison(T + 10),
        check(T + 60, 25, UCNA, misc=0x9000201D809C086),
        edac(T + 61, EDAC_DIMM, EDAC_FATAL),
        check(T + 200, mce.FIRMWARE_BANK, FAKED, misc=0),
        edac(T + 201, EDAC_DIMM, EDAC_FATAL),
    ]


@pytest.mark.parametrize("severity", [CORRECTED, RECOVERABLE])
def test_one_error_is_one_whoever_reports_it(tmp_path: Path, severity: int) -> None:
    snapshot = told(tmp_path, one_error(severity))
    origin = origin_of(snapshot)
    assert (origin.history.count, origin.history.corrected) == (1, 0)
    assert {label: dimm.count for label, dimm in snapshot.dimms.items()} == {EDAC_DIMM: 1}


def test_another_cpu_that_runs_into_it_is_no_other_error(tmp_path: Path) -> None:
    reports = [check(T + n, 1, SRAR, cpu=n, socketid=n % 2) for n in range(6)]
    origin = origin_of(told(tmp_path, [*reports, poison(T + 9)]))
    assert origin.history.count == 1


def test_edac_that_speaks_after_all_banks_repeats_itself(tmp_path: Path) -> None:
    banks = [check(T + n, n, SRAR, cpu=3) for n in range(3)]
    events = [*banks, *(edac(T + 3 + n, EDAC_DIMM, EDAC_FATAL) for n in range(3))]
    snapshot = told(tmp_path, [*events, poison(T + S)])
    assert origin_of(snapshot).history.count == 1
    assert snapshot.dimms[EDAC_DIMM].count == 1


def test_edac_alone_repeats_itself(tmp_path: Path) -> None:
    """Where the machine checks behind its reports name no page, as a UMC's."""
    reports = [edac(T + n * MS, EDAC_DIMM, EDAC_FATAL) for n in range(3)]
    snapshot = told(tmp_path, [*reports, poison(T + S)], AMD)
    assert origin_of(snapshot).history.count == 1
    assert snapshot.dimms[EDAC_DIMM].count == 1


def test_errors_of_their_own_are_added_up(tmp_path: Path) -> None:
    """Three corrected ones by bank and by EDAC, a minute apart, then one that could not be."""
    reports: list[Event] = []
    for n in range(3):
        at = T + n * 60 * S
        reports += [check(at, 7, CONTROLLER), edac(at + MS, EDAC_DIMM)]
    reports += [
        check(T + 300 * S, 7, UCNA),
        edac(T + 300 * S + MS, EDAC_DIMM, EDAC_FATAL),
        edac(T + 400 * S, EDAC_DIMM, address=ADDR + 4096),
        poison(T + 400 * S),
    ]
    snapshot = told(tmp_path, reports)
    origin = origin_of(snapshot)
    assert (origin.history.count, origin.history.corrected) == (4, 3)
    dimm = snapshot.dimms[EDAC_DIMM]
    assert (dimm.count, dimm.corrected) == (5, 4)


@pytest.mark.parametrize(
    ("vendor", "status", "count"),
    [
        (INTEL, 0xCC0000C000010092, 3),
        (INTEL, 0xCC00000000010092, 1),
        (INTEL, 0xCC0000C000010092 | mce.UC, 1),
        (AMD, 0xDC2048C000080A13, 1),  # the northbridge's
    ],
)
def test_registers_that_count(tmp_path: Path, vendor: str, status: int, count: int) -> None:
    snapshot = told(tmp_path, [check(T, 4, status), poison(T + 1)], vendor)
    assert origin_of(snapshot).history.count == count


def test_a_driver_that_counts_none_reports_one(tmp_path: Path) -> None:
    assert edac(T, EDAC_DIMM, error_count=0).count == 1
    origin = origin_of(told(tmp_path, [edac(T, EDAC_DIMM, error_count=0), poison(T)]))
    assert (origin.history.count, origin.history.corrected) == (1, 1)
    many = told(tmp_path, [edac(T, EDAC_DIMM, error_count=7), poison(T)])
    assert origin_of(many).history.corrected == many.dimms[EDAC_DIMM].corrected == 7
