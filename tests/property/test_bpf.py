"""What eBPF programs send and what BTF says, damaged."""

from __future__ import annotations

import ctypes
import struct

from hypothesis import given
from hypothesis import strategies as st

from kvmtrace import btfblob, host, wire
from kvmtrace.correlate import Correlator
from kvmtrace.events import Lost
from kvmtrace.sources import bpf_records as records
from kvmtrace.sources import bpf_refusals
from kvmtrace.sources.bpf_events import Translator
from kvmtrace.sources.bpf_layout import read_symbols
from kvmtrace.sources.decoding import WRONG, checked
from tests.property import examples
from tests.property.damage import placed
from tests.property.parsers import Parser, laws, text
from tests.unit.test_bpf_events import Kernel
from tests.unit.test_btfblob import BEFORE, INT, STRINGS, TASK, blob


def _offset(data: bytes) -> None:
    path = placed(data, "btf/vmlinux")
    for member in ("pid", "flags", "tgid"):
        found = btfblob.offset("task_struct", member, path)
        assert found is None or found >= 0
    host._memory_fault_exit_by_name(path.rpartition("/")[0])


test_any_input, test_long_input, test_what_was_found = laws(
    {
        "BTF": Parser(
            _offset,
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
        "libbpf": Parser(
            text(lambda said: bpf_refusals.explain("fexit", said, said.split("\n"))),
            [b"Failed to attach BPF program b'x' to kprobe b'y'\nInvalid argument"],
        ),
    }
)

# What the programs fill in as the kernel has it. Addresses of VMs and threads are few, so that
# records meet.
_WORD = st.integers(0, (1 << 64) - 1) | st.integers(0, 3)


@st.composite
def _record(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(sorted(records.RECORDS)))
    of = records.RECORDS[kind]
    size = ctypes.sizeof(of) - ctypes.sizeof(records.Header)
    filling = draw(st.binary(max_size=16)) or b"\0"
    body = (filling * (size // len(filling) + 1))[:size]
    header = records.Header(
        draw(st.integers(0, 1 << 60)),
        draw(st.integers(0, 2)),
        draw(st.integers(0, 2)),
        kind,
        draw(st.integers(1, 3)),
        draw(st.integers(4194301, 4194303)),
        0,
    )
    record = bytearray(bytes(header) + body)
    if draw(st.booleans()):
        at = draw(st.integers(ctypes.sizeof(records.Header), len(record) - 8)) // 8 * 8
        struct.pack_into("=Q", record, at, draw(_WORD))
    if kind == records.HW:  # a number of the programs' own
        struct.pack_into("=I", record, records.HwRecord.via.offset, draw(st.integers(0, 4)))
    return bytes(record)


@given(
    raw=st.lists(_record(), max_size=12),
    counted=st.lists(st.tuples(st.integers(0, 2), st.integers(-200, 0), _WORD), max_size=3),
)
@examples(200)
def test_records_are_told_or_lost(raw: list[bytes], counted: list[tuple[int, int, int]]) -> None:
    """``counted``: (VM, ret, how often)."""
    kernel = Kernel(*((records.ExitKey(kvm=kvm, ret=ret), n) for kvm, ret, n in counted))
    kernel.active = 1
    translator = Translator(0, ({}, {}), "/nonexistent")
    correlator = Correlator()
    for event in [*translator.translate(raw, kernel), *translator.flush(kernel)]:
        try:
            event = checked(event)  # noqa: PLW2901
        except WRONG:
            event = Lost(0, "unwritable_events", 1)  # noqa: PLW2901
        wire.event_line(correlator.feed(event))
    wire.top(correlator.snapshot())
