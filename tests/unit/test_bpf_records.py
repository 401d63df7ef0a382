"""Records and results of the eBPF programs: the C structs and constants against their mirrors."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from kvmtrace.sources.bpf import exits, hardware, lookup, poison, records, signals, translator
from kvmtrace.sources.bpf.compiler import bpf_dir

COMPILER = shutil.which("cc") or shutil.which("gcc")

# C struct: its mirror
STRUCTS: dict[str, type[ctypes.Structure]] = {
    "header": records.Header,
    "vm_record": records.VmRecord,
    "exit_key": exits.ExitKeyRecord,
    "exit_count": exits.ExitCount,
    "exit_record": exits.ExitRecord,
    "refusal_key": exits.RefusalKeyRecord,
    "refusal_count": exits.RefusalCount,
    "sigbus_record": signals.SigbusRecord,
    "sigbus_key": signals.SigbusKey,
    "sigbus_count": signals.SigbusCount,
    "fault_record": signals.FaultRecord,
    "owner": poison.OwnerRecord,
    "gmem_walk": poison.GmemWalk,
    "poison_record": poison.PoisonRecord,
    "page_record": poison.PageRecord,
    "mce_record_": hardware.MceRecord,
    "hw_record": hardware.HwRecord,
}
RESULTS: dict[str, type[ctypes.Structure]] = {
    "vm_row": lookup._VmRow,
    "vms_result": lookup._VmsResult,
    "slot_row": lookup._SlotRow,
    "slots_result": lookup._SlotsResult,
    "entry_result": lookup._EntryResult,
    "page_result": lookup.PageResult,
}
KINDS = "EXIT POISON SIGBUS FAULT MCE VM_NEW VM_GONE HW PAGE".split()
CONSTANTS: dict[str, int] = {
    **{f"RECORD_{kind}": getattr(records, kind) for kind in KINDS},
    **{name: value for name, value in vars(hardware).items() if re.match("HW_[A-Z]", name)},
    **{name: value for name, value in vars(exits).items() if name.startswith("ACCESS_")},
    "HW_TEXT": records.HW_TEXT,
    "LOST_PLACES": len(records.LOST_PLACES),
    "MAX_OWNERS": poison.MAX_OWNERS,
    "GMEM_NOT_WATCHED": exits.GMEM_NOT_WATCHED,
    "NO_GFN": exits.NO_GFN,
    "NO_GPA": exits.NO_GPA,
    "NO_VCPU": exits.NO_VCPU,
    "VM_ROWS": lookup._VM_ROWS,
    "SLOT_STEPS": lookup._SLOT_STEPS,
    "ID_BUCKETS": lookup._ID_BUCKETS,
}

HEAD = """
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
typedef uint8_t u8; typedef uint32_t u32; typedef uint64_t u64; typedef int32_t s32;
#include "record.h"
"""


def definitions(text: str) -> str:
    """The structs and numbers of a C file that also has programs in it."""
    found = re.findall(
        r"^struct \w+ \{.*?^\};|^#define [A-Z_]+ \d+\b", text, re.MULTILINE | re.DOTALL
    )
    return "\n".join(found)


def printed() -> Iterator[str]:
    """The statements of a program that prints what the mirrors have to agree with."""
    for name, mirror in (STRUCTS | RESULTS).items():
        yield f'printf("{name} 0 %zu\\n", sizeof(struct {name}));'
        for field, *_ in mirror._fields_:
            place = f"offsetof(struct {name}, {field}), sizeof(((struct {name} *)0)->{field})"
            yield f'printf("{name}.{field} %zu %zu\\n", {place});'
    for name in CONSTANTS:
        yield f'printf("{name} %lld 0\\n", (long long)({name}));'


@pytest.fixture(scope="module")
def c(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """{struct or struct.field: (offset, size)}, {constant: (value, 0)}."""
    if COMPILER is None:
        pytest.skip("there is no C compiler")
    directory = tmp_path_factory.mktemp("records")
    source = directory / "records.c"
    lookup_text = (bpf_dir() / "lookup.bpf.c").read_text()
    body = "\n".join(printed())
    source.write_text(f"{HEAD}{definitions(lookup_text)}\nint main(void) {{\n{body}\n}}\n")
    program = str(directory / "records")
    subprocess.run([COMPILER, f"-I{bpf_dir()}", "-o", program, str(source)], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {name: (int(at), int(size)) for name, at, size in map(str.split, lines.splitlines())}


@pytest.mark.parametrize("name", STRUCTS | RESULTS)
def test_a_struct_and_its_mirror(c: dict[str, tuple[int, int]], name: str) -> None:
    mirror = (STRUCTS | RESULTS)[name]
    assert ctypes.sizeof(mirror) == c[name][1]
    for field, *_ in mirror._fields_:
        ours = getattr(mirror, field)
        assert (ours.offset, ours.size) == c[f"{name}.{field}"], field
    sizes = [c[f"{name}.{field}"][1] for field, *_ in mirror._fields_]
    assert sum(sizes) == c[name][1], "a hole, or a field without a mirror"


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_and_its_mirror(c: dict[str, tuple[int, int]], name: str) -> None:
    width = 32 if name == "NO_VCPU" else 64
    assert c[name][0] % (1 << width) == CONSTANTS[name] % (1 << width)


def test_every_struct_has_a_mirror() -> None:
    in_c = set(re.findall(r"^struct (\w+) \{", (bpf_dir() / "record.h").read_text(), re.MULTILINE))
    assert in_c == set(STRUCTS)
    text = (bpf_dir() / "lookup.bpf.c").read_text()
    assert set(re.findall(r"^struct (\w+) \{", text, re.MULTILINE)) == set(RESULTS)


def test_every_type_of_record_has_a_mirror() -> None:
    assert set(translator.RECORDS) == {getattr(records, kind) for kind in KINDS}
    text = (bpf_dir() / "record.h").read_text()
    assert set(re.findall(r"\bRECORD_(\w+)", text)) == set(KINDS)


def test_the_first_of_a_record_is_its_header() -> None:
    for mirror in translator.RECORDS.values():
        assert mirror._fields_[0][:2] == ("h", records.Header)
