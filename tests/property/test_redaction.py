"""A redacted bundle contains no name of its recording, in any form, and can still be replayed.

Names are letters that other words have as well, so bytes are counted: there must be no more of them
than in the bundle of the same story with other names.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from kvmtrace.correlate import Correlator
from kvmtrace.events import (
    KINDS,
    Event,
    Exit,
    Host,
    HwError,
    Lost,
    Owned,
    Owner,
    Poison,
    Sigbus,
    VmSeen,
)
from kvmtrace.linux import host
from kvmtrace.model import Snapshot
from kvmtrace.probes import Probe
from kvmtrace.sanitize import clean
from kvmtrace.sources.codec import Decoder
from kvmtrace.sources.recording import Writer
from kvmtrace.views import redaction
from kvmtrace.views.redaction import Redaction
from kvmtrace.vmm.command_line import VMMS
from tests.unit.command_line import invoke
from tests.unit.fake import SECOND, T0


def _systemd(name: str) -> str:
    return "".join(
        c if c.isalnum() and c.isascii() else "".join(f"\\x{b:02x}" for b in c.encode())
        for c in name
    )


def _octal(name: str) -> str:
    return "".join(c if c.isalnum() else "".join(f"\\{b:03o}" for b in c.encode()) for c in name)


def _json(name: str) -> str:
    return "".join(f"\\u{c}" for c in re.findall("....", name.encode("utf-16-be").hex()))


def _comm(name: str) -> str:
    """As the kernel truncates it; a truncated character is dropped."""
    return name.encode()[:15].decode("utf-8", "ignore")


WRITINGS: tuple[typing.Callable[[str], str], ...] = (
    str,
    str.upper,
    str.lower,
    _systemd,
    _octal,
    lambda name: json.dumps(clean(name))[1:-1],
    _json,
    lambda name: quote(name, safe=""),
    lambda name: "".join(f"&#{ord(c)};" for c in name),
)
TEXTS = ("{}", "seen while {} ran", "/run/kvm/{}.sock", "'{}':4711", "domain-3-{}/master-key")


@dataclasses.dataclass(frozen=True)
class Names:
    """Names in the input: of VMs and their processes, uuids, numbers, and of the host."""

    vms: tuple[str, ...]
    processes: tuple[str, ...]
    uuid: str
    number: str
    host: str

    def all(self) -> list[str]:
        return [*self.vms, *self.processes, self.uuid, self.number, self.host]


OTHERS = Names(
    ("zqkwvJq", "jjqkxZqw", "kqzwjxQq"),
    ("qqzjwkx", "wjkqzxx"),
    "9f8e7d6c-5b4a-4938-a716-05f4e3d2c1b0",
    "70707070",
    "wqzkj.xxjqkw.qzqz",
)


def log(names: Names, writing: typing.Callable[[str], str], text: str) -> str:
    """A recording whose texts quote every name."""
    texts = iter([text.format(writing(name)) for name in names.all()] * 99)
    events: list[Event] = []
    for n, name in enumerate(names.vms, 1):
        vmm = names.processes[n % len(names.processes)]
        uuid, number = (names.uuid, names.number) if n == 1 else (None, None)
        events += [
            VmSeen(T0, n, 4000 + n, name, uuid, vmm, number, next(texts)),
            Owned(T0 + n, n, Owner(n, n, n << 12), "pagemap", 4096),
            Poison(T0 + n, n, "dirty LRU page", "Failed", tid=n),
            Exit(T0 + SECOND, n, 0, 133, 39, True, tid=n, gfn=n, gpa=n << 12, size=4096, flags=0),
        ]
    events.append(Sigbus(T0 + SECOND, 9, 9, 4, 0x7F0000000000, pfn=2, comm=names.processes[-1]))
    for _ in range(len(names.all())):
        quoting = HwError(T0 + SECOND, next(texts), next(texts), pfn=1, label=next(texts))
        events += [
            dataclasses.replace(quoting, message=next(texts), label_from=next(texts)),
            Poison(T0 + SECOND, 77, f"of {next(texts)}", f"by {next(texts)}"),
            Lost(T0 + SECOND, next(texts), 1),
        ]
    probe = Probe("run", False, next(texts), next(texts), next(texts), next(texts))
    of = Host(names.host, f"6.1 {next(texts)}", "bpf", next(texts))
    file = io.StringIO()
    Writer(file, of).write(events, (probe,))
    return file.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "bcc", lambda: host.Bcc(None))  # a process each
        yield tmp_path_factory.mktemp("bundles")


def redacted(recording: str, place: Path) -> str:
    """All contents of a recording's bundle, including the bytes of the archive."""
    path, out = place / "story.jsonl", place / "out.tar.gz"
    path.write_text(recording)
    result = invoke("bundle", "--redact", "--force", "-o", str(out), "--from", str(path))
    assert result.exit_code == 0, result.stderr
    packed = out.read_bytes()
    assert gzip.compress(b"")[:4] == packed[:4]  # no file name, no comment
    text = gzip.decompress(packed).decode()
    # What JSON has escaped, once more as it is meant.
    meant = [
        json.dumps(json.loads(line), ensure_ascii=False)
        for line in text.splitlines()
        if line.startswith("{") and line.endswith("}")
    ]
    return "\n".join([text, *meant])


LETTERS = st.characters(exclude_categories=["Cs"])
NAME = (
    st.text(LETTERS, min_size=1, max_size=40)
    | st.from_regex(r"[A-Za-z][a-z]{0,9}[-_.@ %\\]?[a-z0-9]{0,12}", fullmatch=True)
    | st.sampled_from(
        [
            *"a vm vm-1 1 4711 host anon-1 qemu \\x41cme münchen-db ß-straße a…".split(),
            *("银行数据库-生产环境-一号", f"pod-{OTHERS.uuid}", "x" * 128),
        ]
    )
).filter(lambda name: clean(name) != "")
NAMES = st.builds(
    Names,
    st.tuples(NAME, NAME, NAME),
    st.tuples(NAME, NAME),
    st.uuids().map(str),
    st.integers(100, 99_999_999).map(str),
    st.from_regex(r"[a-z][a-z0-9-]{2,12}(\.[a-z]{4,9}\.[a-z]{2,5})?", fullmatch=True) | NAME,
)


@functools.cache
def _control(writing: typing.Callable[[str], str], text: str, place: Path) -> str:
    return redacted(log(OTHERS, writing, text), place).lower()


@settings(deadline=None)
@given(names=NAMES, writing=st.sampled_from(WRITINGS), text=st.sampled_from(TEXTS))
@example(
    names=Names(
        ("vm", "vm-1", "anon-1"), ("acmebank-payroll", "ACMEBANK"), OTHERS.uuid, "1", "host"
    ),
    writing=_comm,
    text="{}",
)
@example(  # "QEMU" is kept, and "U" is a letter of it
    names=Names(("0", "0", "QEMU"), ("0", "U"), OTHERS.uuid, "100", "0"),
    writing=_json,
    text="{}",
)
def test_no_byte_of_a_name_comes_out(
    names: Names, writing: typing.Callable[[str], str], text: str, place: Path
) -> None:
    there = redacted(log(names, writing, text), place).lower()
    control = _control(writing, text, place)
    for name in names.all():
        if clean(name).lower() in VMMS:  # kept, and letters of it may be other names
            for kept in (json.dumps(writing(name))[1:-1], writing(name)):
                there = there.replace(kept.lower(), "")
    for name in names.all():
        letters = redaction.fold(clean(name).rstrip("…"))[0].encode()
        if not letters or (len(letters) < 4 and writing in (str.upper, str.lower)):
            continue  # backslashes only; "a" is not "A"
        for needle in {clean(name), clean(writing(name)), json.dumps(clean(name))[1:-1]}:
            if clean(name).lower() in VMMS or redaction.is_fixed(needle):
                continue  # what kvmtrace and the kernel say anyhow
            if len(needle) < 3 or name.isdecimal():
                continue  # letters and numbers are everywhere
            assert there.count(needle.lower()) <= control.count(needle.lower()), needle


def model(recording: str) -> Snapshot:
    correlator, decoder = Correlator(), Decoder()
    for line in recording.splitlines()[1:]:
        if (event := decoder.event(json.loads(line))) is not None:
            correlator.feed(event)
    return correlator.snapshot()


@settings(deadline=None)
@given(names=NAMES)
def test_what_happened_is_the_same(names: Names) -> None:
    """Equal names have equal replacements."""
    before = model(recording := log(names, str, "{}"))
    decoder = Decoder()
    events = [decoder.event(json.loads(line)) for line in recording.splitlines()[1:]]
    known = [event for event in events if event is not None]
    names_of = Redaction(known, Host(names.host, "k", "bpf"))
    file = io.StringIO()
    Writer(file, names_of.host(Host(names.host, "k", "bpf"))).write(names_of.events(known), ())
    after = model(file.getvalue())
    assert [(vm.pid, vm.exits) for vm in before.vms.values()] == [
        (vm.pid, vm.exits) for vm in after.vms.values()
    ]
    assert [(i.id, i.state, i.owners, i.verdict) for i in before.incidents] == [
        (i.id, i.state, i.owners, i.verdict) for i in after.incidents
    ]
    pairs = {(a.name, b.name) for a, b in zip(before.vms.values(), after.vms.values(), strict=True)}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_of_an_event_is_searched(kind: str) -> None:
    """Including fields that are added later."""
    hints = typing.get_type_hints(KINDS[kind])
    fields = [field.name for field in dataclasses.fields(KINDS[kind])]
    given: dict[str, typing.Any] = dict.fromkeys(fields, 1)
    texts = [name for name in fields if str in (hints[name], *typing.get_args(hints[name]))]
    given |= dict.fromkeys(texts, "by ACME-db")
    if kind == "kernel_counts":
        given["failures"] = (("ACME-db", 1),)
    event = KINDS[kind](**given)
    names = Redaction([VmSeen(T0, 1, 1, "ACME-db", None, "ACME-db"), event])
    assert "acme" not in repr(names.event(event)).lower()


@given(name=NAME)
def test_fixed_words_are_no_names(name: str) -> None:
    """A VM may be named like a word that the kernel or kvmtrace uses: that word is not replaced."""
    assume(clean(name))
    names = Redaction(
        [VmSeen(T0, 1, 1, clean(name)), VmSeen(T0, 2, 2, "ring"), VmSeen(T0, 3, 3, "page")]
    )
    for text in ("dirty LRU page", "ring", "ftrace_signals", "ras:mc_event", "11", "Failed"):
        assert names.text(text) == text
    assert redaction.Redaction([]).text("any text") == "any text"
