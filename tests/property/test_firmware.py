"""Damaged reports of firmware and hardware: SMBIOS, CPER, machine checks, EDAC."""

from __future__ import annotations

import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvmtrace import dimm_names
from kvmtrace.events import HwError
from kvmtrace.linux import cper, kernel_log, mce, smbios
from kvmtrace.sanitize import clean
from kvmtrace.sources.codec import checked
from kvmtrace.sources.ftrace import hardware
from kvmtrace.sources.ftrace.records import Record
from tests.property import examples
from tests.property.damage import damaged, directory, placed
from tests.property.parsers import Parser, laws, text


def structure(kind: int, handle: int, fields: bytes, *strings: str) -> bytes:
    """One of SMBIOS."""
    head = struct.pack("<BBH", kind, 4 + len(fields), handle)
    return head + fields + b"".join(one.encode() + b"\0" for one in strings or ("",)) + b"\0"


_DEVICE = bytes(12) + b"\1\2" + bytes(66)
_NUMBERED = bytes(8) + b"\xff\x7f" + bytes(2) + b"\1\2" + bytes(5) + b"\3\4\0\5" + bytes(60)
DMI = [
    structure(0, 0, bytes(20), "vendor", "1.0")
    + structure(17, 0x1100, _DEVICE, "DIMM_A1", "BANK 0")
    + structure(17, 0x1101, _DEVICE, "DIMM_A1", "Not Specified")
    + structure(127, 0x7F00, b""),
    structure(17, 9, _DEVICE, "CPU0_DIMM_G1", "NODE 3"),
    structure(17, 9, _NUMBERED, "A1", "NODE 3", "Samsung", "S4E5R6I7AL", "M393A4K40DB3-CWE"),
]
KMSG = [
    b"4,339,5140900,-;Memory failure: 0x103275: recovery action for dirty LRU page: Recovered\n",
    b"6,1,0,c;mce: x\n SUBSYSTEM=y\n",
    b"<4>[    5.140900] Memory failure: x\n<30>[ 6.0] mce: a program\n",
]


def _logged(data: bytes) -> None:
    for lines in (kernel_log.of_kmsg([data]), kernel_log.of_syslog(data)):
        for _, logged in lines:
            assert logged == clean(logged, len(logged))


NAMES = [
    *(b"CPU_SrcID#0_MC#2_Chan#0_DIMM#0", b"any memory", b"DIMM0 or DIMM0 or unknown memory"),
    *(b"Card01, ChnG, DIMM0", b"mc#0csrow#2channel#1", b"[Not Specified] DIMM_A1 None"),
    *(b"no dimm no dimm 1", b"To Be Filled By O.E.M.", b"CPU_SrcID#0_HBMC#1_Chan#1"),
]
ARM_INFO = struct.pack("<BBHBHBQQQ", 0, 32, 0x10, 0, 0, 0, 0, 0, 0x1234000)
VENDORS = st.sampled_from([None, *mce.AMD, *mce.LIKE_INTEL, "Other"])
WORD = st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 1, 1 << 63, (1 << 64) - 1])
BYTE = st.integers(0, 255)
TEXT = damaged(NAMES).map(lambda data: data.decode("utf-8", "replace"))


def _dmi(table: bytes) -> None:
    path = placed(table, "sys/firmware/dmi/tables/DMI")
    labels = smbios.dimm_labels(path)
    assert len(set(labels.values())) == len(labels)
    assert all(0 <= handle < 1 << 16 for handle in labels)
    for device in smbios.memory_devices(path) or ():
        texts = (device.manufacturer, device.part_number, device.serial_number)
        assert all(one is None or one == clean(one, len(one)) != "" for one in texts)
        assert device.size_bytes is None or 0 < device.size_bytes < 1 << 52
    smbios.read(f"{directory()}/sys")


def _name(name: str) -> None:
    for found in (dimm_names.label(name), dimm_names.of_fru(name)):
        if found is not None:
            assert found == clean(found, len(found))
            dimm_names.candidates(found)
            assert dimm_names.names(found) in ("dimm", "rank", "channel", "candidates")


test_any_input, test_long_input, test_what_is_known = laws(
    {
        "SMBIOS": Parser(_dmi, DMI),
        "kernel_log": Parser(_logged, KMSG),
        "DIMM": Parser(text(_name), NAMES),
        "Arm": Parser(cper.arm_address, [ARM_INFO, ARM_INFO * 3]),
        "extlog": Parser(
            lambda data: cper.memory(cper.extlog(0x1000, 12, 3, data), {5: "A"}),
            [bytes([255] * 64), bytes(48)],
        ),
        "FRU": Parser(lambda data: mce.fru_text(1 << 53, data), [b"DIMM_A1\0\0", b"P1-DIMMA2"]),
    }
)


def _fit(error: HwError) -> None:
    """Whether a recording would accept it: every field has its type and is in range."""
    assert checked(error).addr == error.addr
    assert error.grain is None or 0 < error.grain < 1 << 64


@given(
    words=st.tuples(WORD, WORD, WORD, WORD, WORD),
    severity=st.integers(-(1 << 31), (1 << 31) - 1),
)
@examples(300)
def test_a_memory_error_section_is_told(words: tuple[int, ...], severity: int) -> None:
    fields: dict[str, Any] = dict(zip(cper.MemoryErrorSection._fields, words, strict=True))
    labels = smbios.Firmware({0x1100: "DIMM_A1"}, cper.GHES)
    _fit(hardware.error(Record(1, "apei", fields | {"sev": severity}), labels))


@given(
    pa=WORD,
    lsb=BYTE,
    etype=BYTE,
    sev=BYTE,
    data=damaged([bytes([255] * 64), bytes(48)]),
    fru=TEXT,
)
@examples(300)
def test_an_extended_log_is_told(
    *, pa: int, lsb: int, etype: int, sev: int, data: bytes, fru: str
) -> None:
    fields = {"pa": pa, "pa_mask_lsb": lsb, "etype": etype, "sev": sev, "data": data}
    _fit(hardware.error(Record(1, "extlog", fields | {"fru_text": fru}), smbios.Firmware()))


@given(
    address=WORD,
    grain_bits=BYTE,
    kind=BYTE,
    count=st.integers(0, (1 << 16) - 1),
    layers=st.lists(st.integers(-128, 127), min_size=4, max_size=4),
    label=TEXT,
    message=TEXT,
)
@examples(300)
def test_what_edac_says_is_told(
    *,
    address: int,
    grain_bits: int,
    kind: int,
    count: int,
    layers: list[int],
    label: str,
    message: str,
) -> None:
    fields: dict[str, Any] = {"error_type": kind, "address": address, "grain_bits": grain_bits}
    fields |= {"error_count": count, "label": label, "msg": message}
    names = ("mc_index", "top_layer", "middle_layer", "lower_layer")
    fields |= dict(zip(names, layers, strict=True))
    alike = smbios.Firmware(alike=frozenset({"DIMM_A1"}))
    _fit(hardware.error(Record(1, "mc_event", fields), alike))


@given(sev=st.integers(-1, 9), buffer=damaged([ARM_INFO, ARM_INFO * 3]), fru=TEXT)
@examples(200)
def test_what_arm_and_other_sections_say_is_told(sev: int, buffer: bytes, fru: str) -> None:
    fields = {"sev": sev, "pei_buf": buffer, "fru_text": fru}
    for probe in ("arm_event", "non_standard"):
        _fit(hardware.error(Record(1, probe, fields), smbios.Firmware({}, cper.GHES)))


@given(
    status=WORD,
    addr=WORD,
    misc=st.none() | WORD,
    bank=BYTE,
    ipid=st.none() | WORD,
    vendor=VENDORS,
    bits=st.none() | st.integers(1, 64),
    smca=st.booleans(),
    data=st.binary(max_size=20),
)
@examples(300)
def test_a_machine_check_is_judged(
    *,
    status: int,
    addr: int,
    misc: int | None,
    bank: int,
    ipid: int | None,
    vendor: str | None,
    bits: int | None,
    smca: bool,
    data: bytes,
) -> None:
    where = mce.physical(addr, status, misc, vendor, bits, bank=bank, ipid=ipid, smca=smca)
    assert where is None or 0 <= where <= addr
    assert mce.errors(status, vendor, bank) >= 1
    assert mce.at(status, vendor, bank, ipid) in ("memory", "consumer", None)
    assert mce.address_shift(status, misc) in (None, *range(64))
    fields: dict[str, Any] = {"status": status, "addr": addr, "bank": bank, "cpu": 1, "socketid": 0}
    fields |= {"ipid": ipid, "v_data": data} | ({} if misc is None else {"misc": misc})
    event = hardware.machine_check(Record(1, "mce", fields))
    event = checked(event)
    assert isinstance(event, HwError)
    assert event.check
