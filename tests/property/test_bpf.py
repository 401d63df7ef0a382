"""Damaged records of eBPF programs, and damaged BTF."""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.correlate import Correlator
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Lost
from kvmtrace.linux import host
from kvmtrace.linux.btf import Btf
from kvmtrace.linux.kallsyms import read_symbols
from kvmtrace.sources.bpf import attach_errors, records
from kvmtrace.sources.bpf.compiler import CompiledPrograms
from kvmtrace.sources.bpf.exits import ExitKeyRecord
from kvmtrace.sources.bpf.loader import _last_word
from kvmtrace.sources.bpf.translator import RECORDS, BpfTranslator
from kvmtrace.sources.codec import DECODE_ERRORS, checked
from kvmtrace.views import json_output
from tests.property import examples
from tests.property.damage import placed
from tests.property.parsers import Parser, laws, text
from tests.unit.test_bpf_compiler import COMPILED
from tests.unit.test_bpf_translator import Kernel
from tests.unit.test_btf import BEFORE, INT, STRINGS, TASK, blob


def _offsets(data: bytes) -> None:
    path = placed(data, "btf/vmlinux")
    root = path.rpartition("/")[0]
    for member in ("pid", "flags", "tgid", "task.pid"):
        try:
            found = Btf(root).offset("task_struct", member)
        except KvmtraceError:
            continue
        assert found is None or found >= 0
    host.types(root)


test_any_input, test_long_input, test_what_is_known = laws(
    {
        "BTF": Parser(
            _offsets,
            [
                blob(*BEFORE, TASK),
                blob(INT, TASK),
                struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, 0, 0, len(STRINGS)) + STRINGS,
            ],
        ),
        "kallsyms": Parser(
            lambda data: read_symbols(
                {"memory_failure", "kvm_gmem_get_pfn"}, placed(data, "kallsyms")
            ),
            [
                b"ffffffff8126d1c0 t memory_failure\n0000000000000000 T kvm_gmem_get_pfn\t[kvm]\n",
            ],
        ),
        "compiler": Parser(
            text(attach_errors.errno_in),
            [b"could not open bpf map: exits, error: Operation not permitted"],
        ),
        "verifier": Parser(_last_word, [b"0: (95) exit\nR0 !read_ok\nprocessed 1 insns\n"]),
        "programs": Parser(
            lambda data: CompiledPrograms.from_object(json.loads(data)),
            [json.dumps(COMPILED.as_object()).encode()],
            (ValueError, RecursionError),
        ),
    }
)

# What the programs fill in as the kernel has it; few values, so that records meet.
_POOL = (0, 1, 2, 3, 12, 4, 5, 128, 39, 0xFFFFFFFF, 0xFFFFFF7B, (1 << 64) - 1, 1 << 63, 0x80000000)
_KINDS = (
    *((kind,) for kind in sorted(RECORDS)),
    *((records.SIGBUS, kind) for kind in (records.FAULT, records.FAULT, records.SIGBUS)),
)
_COUNT = st.integers(0, (1 << 64) - 1) | st.integers(0, 3)


def _filled(record: ctypes.Structure, numbers: Iterator[int]) -> None:
    for name, *_ in record._fields_:
        value = getattr(record, name)
        if isinstance(value, ctypes.Structure):
            _filled(value, numbers)
        elif isinstance(value, int):
            setattr(record, name, _POOL[next(numbers, 0) % len(_POOL)])
        elif isinstance(value, bytes):
            setattr(record, name, bytes([65, next(numbers, 0)] * 5))


@st.composite
def _records(draw: st.DrawFn) -> list[bytes]:
    """A record, and the next one of the same thread."""
    made: list[Any] = []
    for kind in draw(st.sampled_from(_KINDS)):
        record: Any = RECORDS[kind]()
        _filled(record, iter(draw(st.binary(min_size=24, max_size=50))))
        header = record.h
        # As long as a host is up; processes that there are not.
        header.type, header.ts = kind, draw(st.integers(0, 1 << 60))
        header.tid, header.tgid = 1 + header.tid % 3, 4194301 + header.tgid % 3
        if made:
            header.tid = made[0].h.tid
        if kind == records.HW:
            record.via %= 5  # a number of the programs' own
        if kind == records.SIGBUS and draw(st.booleans()):
            record.target_tid = header.tid
        made.append(record)
    return [bytes(record) for record in made]


@given(
    told=st.lists(_records(), max_size=12),
    counted=st.lists(st.tuples(st.integers(0, 2), st.integers(-200, 0), _COUNT), max_size=3),
)
@examples(200)
def test_records_are_reported_or_lost(
    told: list[list[bytes]], counted: list[tuple[int, int, int]]
) -> None:
    """``counted``: (VM, ret, how often)."""
    kernel = Kernel(*((ExitKeyRecord(kvm=kvm, ret=ret), n) for kvm, ret, n in counted))
    kernel.active = 1
    translator = BpfTranslator(0, ({}, {}), "/nonexistent")
    correlator = Correlator()
    for event in [
        *translator.translate([one for some in told for one in some], kernel),
        *translator.flush(kernel),
    ]:
        try:
            event = checked(event)  # noqa: PLW2901
        except DECODE_ERRORS:
            event = Lost(0, "unwritable_events", 1)  # noqa: PLW2901
        json_output.event_line(correlator.feed(event))
    json_output.top(correlator.snapshot())
