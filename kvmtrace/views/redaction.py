"""Replace the names in a log by stand-ins, so that it can be given to others.

Names of VMs, VMMs and processes, uuids, the host's name and serial numbers are replaced where they
are fields. All
other texts are searched for them, as texts of drivers, firmware and the kernel may quote them. The
log is redacted first, and everything else in a bundle is made of the redacted log.

The same name has the same stand-in everywhere. VMMs of ``command_line.VMMS`` keep their names.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import typing
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from kvmtrace import probes, sanitize
from kvmtrace.events import Event, Host, MachineCheck, Sigbus, VmSeen
from kvmtrace.probes import Probe
from kvmtrace.vmm import command_line

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_T = TypeVar("_T", bound="DataclassInstance")

# Bytes in UTF-8. Shorter names ("a", "vm", "db") are common words, or parts of words.
_SHORT = 4
# Names may be cut: to 15 bytes by the kernel (comm), to 20 by libvirt. A shorter beginning of a
# name is more likely another word.
_CUT = 12
_CUT_OFF = "…"  # by sanitize.clean
_ANY = "…"  # for a name without a stand-in, or one of several names
_UUID_CUT = 8  # the first group
_UUID = re.compile(r"[0-9a-f]{8}(?:[-_]?[0-9a-f]{4}){3}[-_]?[0-9a-f]{12}", re.IGNORECASE)
_ROLES = ("vm", "vmm", "process", "serial")
# mm/memory-failure.c, arch/x86/mm/fault.c; show_regs_print_info. A name of 15 bytes may be a VM's.
_PROCESS = re.compile(
    r"(?P<before>\b(?:SIGBUS to|signal to|killing) )(?P<comm>.{1,64})(?P<after>:\d+\b)"
    r"|(?P<before_2>\bComm: )(?P<comm_2>.{1,64}?)(?P<after_2> (?:Not tainted|Tainted|Kdump)|$)",
    re.IGNORECASE,
)
_KNOWN_PROCESS = re.compile(r"qemu-system-[a-z0-9_]{1,8}|qemu-kvm|CPU \d{1,4}/KVM")
_HEX = re.compile(r"[0-9a-f]+(?:[-_][0-9a-f]+)*")


class Redaction:
    """Stand-ins for the names in ``events``, for the host's, and for serial numbers."""

    def __init__(
        self, events: Iterable[Event], host: Host | None = None, serials: Iterable[str] = ()
    ) -> None:
        seen: dict[str, dict[str, None]] = {role: {} for role in (*_ROLES, "uuid")}
        seen["serial"] = dict.fromkeys(serials)
        numbers: dict[str, None] = {}
        for event in events:
            match event:
                case VmSeen():
                    uuid = event.uuid and event.uuid.lower()
                    for role, word in (("vm", event.name), ("vmm", event.vmm), ("uuid", uuid)):
                        if word and not (role == "vmm" and word in command_line.VMMS):
                            seen[role][word] = None
                    if event.vmid:
                        numbers[event.vmid] = None
                case Sigbus(comm=str(comm)) if comm:
                    seen["process"][comm] = None
        self._of_host = host.name if host else ""
        self._stand_ins = _stand_ins(seen, self._of_host)
        self._host = _series("host", {*self._stand_ins, *numbers, self._of_host}) + "-1"
        # Proxmox VE's number of a VM needs no stand-in of its own: the VM has one.
        self._needles = _Needles(
            {
                **dict.fromkeys(_parts_of_host(self._of_host), self._host),
                **dict.fromkeys(numbers, _ANY),
                **self._stand_ins,
            }
        )
        self.text = functools.lru_cache(maxsize=4096)(self._text)
        """A text with all names in it replaced."""

    def events(self, events: Iterable[Event]) -> list[Event]:
        return [self.event(event) for event in events]

    def event(self, event: Event) -> Event:
        match event:
            case VmSeen():
                vmm = event.vmm if event.vmm in command_line.VMMS else self._name(event.vmm)
                return dataclasses.replace(
                    self._texts(event),
                    name=self._name(event.name),
                    uuid=self._name(event.uuid and event.uuid.lower()),
                    vmm=vmm,
                    vmid=None,
                    unit=None,
                    api_socket=None,
                )
            case Sigbus():
                return dataclasses.replace(self._texts(event), comm=self._name(event.comm))
        return self._texts(event)

    def serial(self, number: str | None) -> str | None:
        """The stand-in for a serial number."""
        return self._name(number)

    def log_line(self, line: str) -> str:
        """A line of the kernel's log without names, those of processes included."""
        return self.text(_PROCESS.sub(self._without_process, line))

    def _without_process(self, match: re.Match[str]) -> str:
        before, comm, after = (part for part in match.groups() if part is not None)
        if comm not in command_line.VMMS and not _KNOWN_PROCESS.fullmatch(comm):
            comm = self._stand_ins.get(comm, _ANY)
        return before + comm + after

    def host(self, host: Host) -> Host:
        return dataclasses.replace(self._texts(host), name=self._host)

    def probes(self, probes: Iterable[Probe]) -> tuple[Probe, ...]:
        return tuple(self._texts(probe) for probe in probes)

    def _name(self, name: str | None) -> str | None:
        # A recording that is still written may have new names by now.
        return self._stand_ins.get(name, _ANY) if name else None

    def _texts(self, value: _T) -> _T:
        """The dataclass with all its texts searched, so that new fields are not forgotten."""
        changes = {name: self._any(getattr(value, name)) for name in _text_fields(type(value))}
        return dataclasses.replace(value, **changes) if changes else value

    def _any(self, item: Any) -> Any:
        if isinstance(item, str):
            return self.text(item)
        if isinstance(item, tuple):
            return tuple(self._any(one) for one in item)
        if isinstance(item, MachineCheck):
            return self._texts(item)
        return item

    def _text(self, text: str) -> str:
        if not text or is_fixed(text):
            return text
        folded, spans = fold(text)
        pieces, done = [], 0
        for at in self._needles.places(folded):
            if spans[at][0] >= done:
                length, stand_in = self._needles.at(folded, at, text, spans)
                if length:
                    pieces += [text[done : spans[at][0]], stand_in]
                    done = spans[at + length - 1][1]
        return "".join([*pieces, text[done:]]) if pieces else text


@functools.cache
def _text_fields(cls: type[DataclassInstance]) -> tuple[str, ...]:
    hints = typing.get_type_hints(cls)
    return tuple(
        f.name
        for f in dataclasses.fields(cls)
        if re.search(r"\b(str|MachineCheck)\b", str(hints[f.name]))
    )


# -- stand-ins


def _stand_ins(seen: dict[str, dict[str, None]], host: str) -> dict[str, str]:
    """{name: stand-in}, in order of appearance; a name in two roles gets that of the first."""
    names = {name for words in seen.values() for name in words} | {host}
    begin = next(
        begin
        for begin in (f"{number:08x}-0000-0000-0000-" for number in itertools.count())
        if not any(name.startswith(begin) for name in names)
    )
    given = {uuid: f"{begin}{number:012d}" for number, uuid in enumerate(seen["uuid"], 1)}
    for role in _ROLES:
        series = _series(role, names)
        new = [name for name in seen[role] if name not in given]
        given |= {name: f"{series}-{number}" for number, name in enumerate(new, 1)}
    return given


def _series(role: str, names: Iterable[str]) -> str:
    """The stem of stand-ins for ``role``, chosen so that no stand-in contains a real name."""
    stems = {re.sub(r"\d+$", "", fold(name)[0]) for name in names if len(name) > 1}
    stems.discard("")
    others = map("".join, itertools.product("xqzjk", repeat=3))
    free = (
        series
        for series in (role, "anon", *others)
        if not any(stem in f"{series}-" for stem in stems)
    )
    return next(free, role)


def _parts_of_host(name: str) -> Iterator[str]:
    """The name, and the labels of one with a domain: they identify the host's owner."""
    *labels, _ = name.split(".")
    yield name
    if not name.replace(".", "").isdigit():
        yield from (label for label in labels if not is_fixed(label))


# -- needles


class _Needles:
    """The names to look for in texts, with their stand-ins."""

    def __init__(self, stand_ins: dict[str, str]) -> None:
        self._names: dict[str, str] = {}  # by what they are folded to
        self._words: dict[str, dict[str, str]] = {}  # the same, by name: whole words only
        uuids: dict[str, str] = {}
        for name, stand_in in stand_ins.items():
            whole = name.removesuffix(_CUT_OFF)
            # A name with what looks like an escape is looked for as it is and unescaped.
            for folded in (fold(whole)[0].strip(), fold(whole, escaped=False)[0].strip()):
                if folded in command_line.VMMS:
                    continue
                if folded.isdecimal() or len(folded.encode()) < _SHORT:
                    # Numbers of few digits are too common to replace.
                    if folded and (not folded.isdecimal() or len(folded) >= _SHORT):
                        self._words.setdefault(folded, {}).setdefault(whole, stand_in)
                    continue
                self._names.setdefault(folded, stand_in)
                for uuid in _UUID.findall(folded):
                    uuids.setdefault(re.sub("[-_]", "", uuid), stand_in)
        self._sorted = _Sorted(self._names)
        self._uuids = _Sorted(uuids)
        begin = {name[:3] for name in (*self._names, *self._words, *uuids)}
        self._begin = {one for one in begin if len(one) == 3}
        self._begin_short = {one[0] for one in begin if len(one) < 3}
        self._begin_uuid = {uuid[:_UUID_CUT] for uuid in uuids}
        self._lengths = sorted({len(name) for name in self._names}, reverse=True)
        self._word_lengths = sorted({len(word) for word in self._words}, reverse=True)

    def places(self, folded: str) -> list[int]:
        """Positions in a text where a name may begin."""
        if folded.endswith(_CUT_OFF):
            return list(range(len(folded)))
        begin, short = self._begin, self._begin_short
        return [
            at for at, first in enumerate(folded) if folded[at : at + 3] in begin or first in short
        ]

    def at(
        self, folded: str, at: int, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[int, str]:
        """The length of the name at this position (0: none), and its stand-in."""
        found = [(0, ""), *self._name(folded, at)]
        if folded[at : at + _UUID_CUT] in self._begin_uuid:
            found += self._uuid(folded, at)
        if self._words and not folded[max(0, at - 1) : at].isalnum():
            found += self._word(folded, at, text, spans)
        return max(found, key=lambda one: one[0])

    def _name(self, folded: str, at: int) -> Iterator[tuple[int, str]]:
        for length in self._lengths:
            if (stand_in := self._names.get(name := folded[at : at + length])) is not None:
                yield len(name), stand_in
                break
        length, stand_in = self._sorted.common(folded, at)
        ends = folded[at + length :] == _CUT_OFF
        if ends or len(folded[at : at + length].encode()) >= _CUT:
            yield length, stand_in

    def _uuid(self, folded: str, at: int) -> Iterator[tuple[int, str]]:
        written = _HEX.match(folded, at)
        assert written is not None
        digits = re.sub("[-_]", "", written[0])
        length, stand_in = self._uuids.common(digits, 0)
        alone = not folded[at - 1 : at].isalnum()
        if length == 32 or (length >= _UUID_CUT and alone and len(set(digits[:length])) > 2):
            # As many digits, with what stands between them.
            marks = itertools.accumulate(character not in "-_" for character in written[0])
            yield next(n for n, count in enumerate(marks, 1) if count == length), stand_in

    def _word(
        self, folded: str, at: int, text: str, spans: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, str]]:
        for length in self._word_lengths:
            word = folded[at : at + length]
            if word in self._words and not folded[at + len(word) : at + len(word) + 1].isalnum():
                written = text[spans[at][0] : spans[at + len(word) - 1][1]]
                for name, stand_in in self._words[word].items():
                    # "a" is not "A".
                    if written == name or written.lower() != name.lower():
                        yield len(word), stand_in


class _Sorted:
    """Sorted names, to find the one with the longest common beginning with a text."""

    def __init__(self, stand_ins: dict[str, str]) -> None:
        self._sorted = sorted(stand_ins)
        self._stand_ins = stand_ins
        self._longest = max(map(len, stand_ins), default=0)

    def common(self, text: str, at: int) -> tuple[int, str]:
        """How many characters at ``at`` are the beginning of a name, and the name's stand-in."""
        part = text[at : at + self._longest]
        place = bisect_left(self._sorted, part)
        near = self._sorted[max(0, place - 1) : place + 1]
        length = max((_common(part, name) for name in near), default=0)
        if not length:
            return 0, ""
        place = bisect_left(self._sorted, part[:length])
        like = [n for n in self._sorted[place : place + 2] if n.startswith(part[:length])]
        whose = {self._stand_ins[name] for name in like}
        return length, whose.pop() if len(whose) == 1 else _ANY


def _common(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


# -- how names are written

# Escapes of JSON, systemd, /proc, URLs and HTML. Other backslashes stand for what follows.
_ESCAPES = re.compile(
    r"(?P<units>(?:\\+u[0-9a-fA-F]{4})+)"
    r"|(?P<bytes>(?:\\+x[0-9a-fA-F]{2}|\\+[0-3][0-7]{2}|%[0-9a-fA-F]{2})+)"
    r"|&\#(?P<html>x[0-9a-fA-F]{1,6}|[0-9]{1,7});"
)
_PLAIN = re.compile(r"(?:[!-$'-[\]-~]| (?! ))*")  # printable ASCII without \\ % &
_UNIT = re.compile(r"\\+u([0-9a-fA-F]{4})")
_BYTE = re.compile(r"(?:\\+x|%)([0-9a-fA-F]{2})|\\+([0-7]{3})")


def fold(text: str, *, escaped: bool = True) -> tuple[str, list[tuple[int, int]]]:
    """``text`` for comparison: without escapes, case, accents, and what ``sanitize.clean`` drops.

    → (folded text, the span in ``text`` of each of its characters). ``escaped``: unescape it.
    """
    if _PLAIN.fullmatch(text):
        return text.lower(), [(n, n + 1) for n in range(len(text))]
    folded: list[str] = []
    spans: list[tuple[int, int]] = []
    for character, span in _unescaped(text) if escaped else _as_written(text, 0, len(text)):
        for one in _folded(character):
            if one != " " or folded[-1:] != [" "]:
                folded.append(one)
                spans.append(span)
    return "".join(folded), spans


@functools.lru_cache(maxsize=4096)
def _folded(character: str) -> str:
    if character == "\\":
        return ""
    cleaned = " " if unicodedata.category(character) == "Zs" else sanitize.clean(character)
    parts = unicodedata.normalize("NFD", cleaned) if cleaned != _CUT_OFF else cleaned
    return "".join(c for c in parts.casefold() if unicodedata.category(c) not in ("Mn", "Me"))


def _as_written(text: str, start: int, end: int) -> Iterator[tuple[str, tuple[int, int]]]:
    yield from ((text[n], (n, n + 1)) for n in range(start, end))


def _unescaped(text: str) -> Iterator[tuple[str, tuple[int, int]]]:
    done = 0
    for match in _ESCAPES.finditer(text):
        yield from _as_written(text, done, match.start())
        yield from _meant(match)
        done = match.end()
    yield from _as_written(text, done, len(text))


def _meant(match: re.Match[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    text, kind = match.string, match.lastgroup
    if kind in ("units", "bytes"):
        pattern, encoding = (_UNIT, "utf-16-be") if kind == "units" else (_BYTE, "utf-8")
        codes = list(pattern.finditer(text, match.start(), match.end()))
        raw = [bytes.fromhex(one[1]) if one[1] else bytes([int(one[2], 8)]) for one in codes]
        while raw:
            # The shortest sequence that is a character; a unit of none becomes "�".
            for size in range(1, min(4, len(raw)) + 1):
                character = b"".join(raw[:size]).decode(encoding, "ignore")
                if character:
                    break
            else:
                size, character = 1, "�"
            yield character[0], (codes[0].start(), codes[size - 1].end())
            del raw[:size], codes[:size]
        return
    number = match["html"]
    code = int(number[1:], 16) if number[0] == "x" else int(number)
    yield chr(code) if code < 0x110000 else "�", match.span()


# -- words that are no names

# Fixed words of kvmtrace, and the kernel's words for pages (action_page_types, action_name in
# mm/memory-failure.c). A VM may have such a name, but a text of such words only does not mean it.
_WORDS = frozenset(
    """
    already buddy clean compound dax delayed different dirty failed failure free high huge
    ignored kernel lru mlocked non order page pages pmd poisoned pud recovered reserved sized
    slab swapcache thp truncated unevictable unknown unmapping unsplit bpf ftrace recording
    fentry fexit kprobe kretprobe fprobe tracepoint raw pagemap mapping fault guest memfd
    memslot bindings file ghes apei extlog ras mc mce event arm non standard edac smbios fru
    corrected deferred recoverable fatal running waiting outside gone ring exit exits keys
    counts refused signal signals faults missed damaged owner owners searches found vms halves
    descriptors incidents told looks refusals soft offlines history events unwritable hung reads
    unreadable processes total clock step localhost localdomain
    """.split()
) | {
    word
    for machine in ("x86_64", "aarch64")
    for spec in (*probes.specs(machine), *probes.context_specs(), probes.RUN_UNDER_WAY)
    for text in (spec.name, *spec.targets)
    for word in re.split(r"[_:]", text)
}


def is_fixed(text: str) -> bool:
    """Whether a text consists of ``_WORDS`` and small numbers only."""
    words = re.split("[ _:-]", text.lower())
    return all(word in _WORDS or (word.isdecimal() and len(word) < _SHORT) for word in words)
