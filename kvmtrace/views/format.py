"""Text in terminal cells, and numbers, sizes and times for people to read."""

from __future__ import annotations

import datetime
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from kvmtrace.events import ClockStep, elapsed
from kvmtrace.judgement.urgency import Level, Urgency
from kvmtrace.wording import UNKNOWN, counted, dimm_of, hex_of, listed

# What views take from here, with what is shared with ``judgement``.
__all__ = ["UNKNOWN", "counted", "dimm_of", "hex_of", "listed"]

Span = tuple[str, str]
"""Text, and the name of its style ("" plain, "title", "head", "bad", "warn", "note", "dim")."""

Line = tuple[Span, ...]

_LEVEL_STYLES = {Level.NOW: "bad", Level.SOON: "warn", Level.WATCH: "note", Level.OVER: "dim"}

ELLIPSIS = "…"

_MIN_ROOM = 20

_SECOND = 1_000_000_000


@lru_cache(maxsize=4096)
def cells(text: str) -> int:
    """The width of ``text`` on a terminal: East Asian wide is two cells, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(map(_char_cells, text))


def _char_cells(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def clip(text: str, width: int) -> str:
    """``text`` in at most ``width`` cells; if it was cut, it ends in "…"."""
    if cells(text) <= width:
        return text
    if width <= 0:
        return ""
    kept, used = [], 0
    for char in text:
        used += _char_cells(char)
        if used > width - 1:
            break
        kept.append(char)
    return "".join(kept) + ELLIPSIS


def pad(text: str, width: int, *, right: bool = False) -> str:
    """``text`` in exactly ``width`` cells, clipped or padded; ``right``: aligned right."""
    text = clip(text, width)
    fill = " " * (width - cells(text))
    return fill + text if right else text + fill


def style_of(urgency: Urgency) -> str:
    """The name of the style that shows how soon somebody must act."""
    return _LEVEL_STYLES[urgency.level]


def plain(line: Line) -> str:
    """The text of a line."""
    return "".join(text for text, _ in line)


def clip_line(line: Line, width: int) -> Line:
    """A line in at most ``width`` cells."""
    if sum(cells(text) for text, _ in line) <= width:
        return line
    kept: list[Span] = []
    for text, style in line:
        room = width - sum(cells(t) for t, _ in kept)
        # One cell is reserved for a "…".
        if cells(text) < room:
            kept.append((text, style))
            continue
        kept.append((clip(text + ELLIPSIS, room), style))
        break
    return tuple(kept)


def fold(text: str, width: int, lead: str = "", under: int | None = None) -> list[str]:
    """``lead`` and ``text`` in lines of at most ``width`` cells, folded between words.

    Further lines are indented by ``under`` cells (the width of ``lead``). A word that is too long
    for a line is cut; where ``lead`` leaves hardly any room, lines are longer than ``width``.
    """
    indent = " " * (cells(lead) if under is None else under)
    width = max(width, cells(lead) + _MIN_ROOM, len(indent) + _MIN_ROOM)
    lines, line, is_empty = [], lead, True
    for whole in text.split():
        word = whole
        while word:
            gap = "" if is_empty else " "
            if cells(line) + len(gap) + cells(word) <= width:
                line, word, is_empty = line + gap + word, "", False
            elif is_empty:
                kept = _beginning(word, width - cells(line))
                line, word = line + kept, word[len(kept) :]
                lines.append(line)
                line = indent
            else:
                lines.append(line)
                line, is_empty = indent, True
    return [*lines, line.rstrip()] if not is_empty or not lines else lines


def _beginning(word: str, width: int) -> str:
    """As many characters of a word as fit, at least one."""
    for end in range(len(word), 1, -1):
        if cells(word[:end]) <= width:
            return word[:end]
    return word[:1]


def refusals_of(undelivered: int) -> str:
    """``3 refusals by guest_memfd of which KVM_RUN did not notify the VMM``."""
    refusals = counted(undelivered, "refusal")
    return f"{refusals} by guest_memfd of which KVM_RUN did not notify the VMM"


def size_of(size: int | None) -> str:
    """``4 KiB``, ``1.5 GiB``; "-" if unknown. Exact up to a MiB: pages are counted in KiB."""
    if size is None:
        return UNKNOWN
    if size < 1024 or (size % 1024 and size < 1 << 20):
        return f"{size} B"
    number, unit = size / 1024, "KiB"
    for unit in ("KiB", "MiB", "GiB", "TiB"):  # noqa: B007 (its last value is used)
        if number < 1024:
            break
        number /= 1024
    return f"{number:.0f} {unit}" if number == int(number) else f"{number:.1f} {unit}"


def span_of(nanoseconds: int | None) -> str:
    """A length of time: ``340 µs``, ``12 ms``, ``1.2 s``, ``5 min``; "-" if unknown."""
    if nanoseconds is None or nanoseconds < 0:
        return UNKNOWN
    if nanoseconds < 1_000_000:
        return f"{nanoseconds / 1e3:.0f} µs"
    if nanoseconds < _SECOND:
        return f"{nanoseconds / 1e6:.0f} ms"
    if nanoseconds < 10 * _SECOND:
        return f"{nanoseconds / 1e9:.1f} s"
    return age_of(0, nanoseconds)


def shift_of(nanoseconds: int) -> str:
    """A signed length of time: ``+1.2 s``, ``-5 min``."""
    return ("+" if nanoseconds >= 0 else "-") + span_of(abs(nanoseconds))


def age_of(ts: int | None, now: int, steps: Sequence[ClockStep] = ()) -> str:
    """How long ago ``ts`` was: ``12 s``, ``5 min``, ``3 h``, ``4 d``; "-" if unknown.

    A time after ``now`` (clocks of two machines) is 0 s ago. ``steps``: of the wall clock, as the
    host may have been suspended in between.
    """
    if ts is None:
        return UNKNOWN
    seconds = max(0, elapsed(ts, now, steps) // _SECOND)
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds // unit} {name}"
    return f"{seconds // 86400} d"


def rate_of(rate: float | None) -> str:
    """Events per second in at most five characters; "-" if unknown."""
    if rate is None:
        return UNKNOWN
    for limit, unit in ((9999.5, ""), (999.5e3, "k"), (999.5e6, "M")):
        if rate < limit:
            number = rate / {"": 1, "k": 1e3, "M": 1e6}[unit]
            # 0.04 is not 0: a rate above 0 is never rounded down to 0.
            whole = number == int(number) or number >= 9.95
            return f"{number:.0f}{unit}" if whole else f"{max(number, 0.1):.1f}{unit}"
    return f"{rate / 1e9:.1f}G"


# Times of day are in the zone of this process: the host's, or UTC where a command was given --utc
# (``cli.options``). So that a reader need not guess, every screen names it once, by ``zone_of``.


def clock_of(ts: int) -> str:
    """Wall time, ``HH:MM:SS``."""
    return f"{_local(ts):%H:%M:%S}"


def stamp_of(ts: int) -> str:
    """Wall time with milliseconds, ``HH:MM:SS.mmm``."""
    return f"{_local(ts):%H:%M:%S}.{ts % _SECOND // 1_000_000:03d}"


def day_of(ts: int) -> str:
    """The date, ``YYYY-MM-DD``."""
    return f"{_local(ts):%Y-%m-%d}"


def date_of(ts: int) -> str:
    """Date and wall time with milliseconds."""
    return f"{day_of(ts)} {stamp_of(ts)}"


def zone_of(ts: int) -> str:
    """The zone of all of these at that time: ``UTC``, ``UTC+02:00``."""
    offset = _offset(ts)
    return f"UTC{offset}" if offset else "UTC"


def rfc3339_of(ts: int) -> str:
    """Date, wall time with milliseconds and its offset: ``2026-09-21T16:13:20.123+02:00``."""
    return f"{day_of(ts)}T{stamp_of(ts)}{_offset(ts) or 'Z'}"


def _offset(ts: int) -> str:
    """``+02:00``; "" for UTC. In minutes, as RFC 3339 has it."""
    offset = _local(ts).utcoffset() or datetime.timedelta()
    minutes = round(offset.total_seconds() / 60)
    hours, rest = divmod(abs(minutes), 60)
    return f"{'-' if minutes < 0 else '+'}{hours:02d}:{rest:02d}" if minutes else ""


def _local(ts: int) -> datetime.datetime:
    # Whole seconds: nanoseconds since 1970 as a float could round up to the next second.
    return datetime.datetime.fromtimestamp(ts // _SECOND, datetime.UTC).astimezone()
