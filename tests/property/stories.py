"""Events as the JSON lines of recordings and serves, valid and malicious."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from hypothesis import strategies as st

from kvmtrace.events import KINDS, Event, Host
from kvmtrace.sources.codec import to_record
from kvmtrace.sources.recording import Writer
from tests.property.damage import damaged
from tests.property.test_events import ANY, SANE, whole
from tests.unit.fake import PROBES
from tests.unit.fake import STORY as SHORT
from tests.unit.test_explain import STORY

HOST = Host("sick-host", "6.18.15", "bpf", "BTF and ring buffer", 4096)
HEADER: dict[str, Any] = {"kvmtrace_recording": 1, "version": "0.5"}
HEADER |= {"name": "sick-host", "kernel": "6.18.15", "source": "bpf", "epoch_offset_ns": 5}
PROBE_LINE: dict[str, Any] = {
    "kind": "probes",
    "probes": [{"name": "run", "attached": True, "target": "kvm_arch_vcpu_ioctl_run"}],
}


def written(events: Iterable[Event]) -> bytes:
    """A recording as the current version writes it."""
    file = io.StringIO()
    Writer(file, HOST).write(events, PROBES)
    return file.getvalue().encode()


def lines(records: Iterable[object]) -> bytes:
    """A recording as versions before checksums wrote it, of any records."""
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _deep(what: str, depth: int, end: str) -> bytes:
    return (what * depth + "1" + end * depth).encode() + b"\n"


# Lines that no kvmtrace has written.
ODD_LINES = [
    *(_deep("[", 2_000, "]"), _deep("[", 100_000, "]"), _deep('{"kind":', 30_000, "}")),
    *(b"[" * 200_000 + b"\n", b"null\n", b"[]\n", b'"x"\n', b"1e999\n", b"NaN\n", b"\n", b"\0\n"),
    *(b'{"kind":"exit"}\n', b'{"kind":"newer","ts":5}\n', b'{"kind":null}\n', b"\xff\xfe{}\n"),
    b'{"kind":"lost","ts":1,"where":"x","count":' + b"9" * 5000 + b"}\n",
    b'{"kind":"lost","ts":1,"where":"' + b"x" * (1 << 20) + b'","count":1}\n',
    b'{"kind":"lost","ts":1,"where":"\\u001b]0;x\\u0007\\u202e\\ud800","count":1}\n',
]

EVIL: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1, 63, 64, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64),
        *(1 << 200, 0.5, 1e308, float("inf"), float("nan"), "", "1", "\x1b[2J", "a\u202eb"),
        *("\ud800", "x" * 2000, "\n", "e" + "\u0301" * 9, [], {}, [[]], [None], [1, 2], ["x", 1]),
        *({"vm": 1}, {"vm": 1, "gfn": True}, [{"vm": -1}], [{"vm": 1, "gfn": 2}], [["total", "x"]]),
    ]
)

EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.sampled_from(STORY),
    *(whole(cls, numbers) for cls in KINDS.values() for numbers in (SANE, ANY)),
)


@st.composite
def records(draw: st.DrawFn, most: int = 12) -> list[dict[str, Any]]:
    """A header and events, with some malicious values."""
    events = [*draw(st.sampled_from([STORY, SHORT, ()])), *draw(st.lists(EVENTS, max_size=most))]
    found: list[dict[str, Any]] = [dict(HEADER), PROBE_LINE, *map(to_record, events)]
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(found) - 1))
        name = draw(st.sampled_from([*sorted(found[at]), "x"]))
        found[at] = found[at] | {name: draw(EVIL)}
    return found


@st.composite
def recordings(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """Valid recordings, and invalid ones of all kinds."""
    match draw(st.integers(0, 4)):
        case 0:
            return lines(draw(records()))
        case 1:
            return draw(damaged(seeds))
        case 2:
            return draw(damaged([lines(draw(records(4)))]))
        case 3:
            good = lines([HEADER, *map(to_record, STORY)]).splitlines(keepends=True)
            for _ in range(draw(st.integers(1, 3))):
                at = draw(st.integers(0, len(good)))
                end = at + draw(st.integers(0, 1))
                good[at:end] = [draw(st.sampled_from([*ODD_LINES, *good]))]
            return b"".join(good)
    return draw(st.binary(max_size=200))


SEEDS = [written(STORY), written(SHORT), lines([HEADER, PROBE_LINE, *map(to_record, STORY)])]
RECORDINGS = recordings(SEEDS)
