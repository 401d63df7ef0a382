"""Options that several commands take."""

from __future__ import annotations

import datetime
import functools
import os
import re
import time

import click

from kvmtrace import sources
from kvmtrace.linux import clock

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_PART = r"(\d+(?:\.\d*)?|\.\d+)(ms|s|m|h|d)"
_PARTS = re.compile(rf"(?:{_PART})+", re.ASCII)
_NUMBER = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?", re.ASCII)


def seconds(value: str | float) -> float:
    """A duration in seconds, greater than zero: ``0.5``, ``10``, ``500ms``, ``1h30m``, ``2d``.

    Raises click.BadParameter. A function, as click's ParamType is generic in new releases only.
    """
    if isinstance(value, float):
        return value
    text = value.strip().lower()
    if _NUMBER.fullmatch(text):
        number = float(text)
    elif _PARTS.fullmatch(text):
        number = sum(float(part) * _UNITS[unit] for part, unit in re.findall(_PART, text))
    else:
        raise click.BadParameter(f"{value!r} is not a duration: 10, 500ms, 5m, 1h30m, 2d")
    if not 0 < number < 1e9:
        raise click.BadParameter(f"{value!r} is not between 0 and 1e9 seconds")
    return number


def days(value: str | float) -> float:
    """A number of days, greater than zero. Raises click.BadParameter."""
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number <= 36500:  # nor NaN, which click's ranges let through
        raise click.BadParameter(f"{value!r} is not a number of days: 90, 0.5")
    return number


def point_in_time(value: str | int) -> int:
    """A time in nanoseconds since the epoch: so long ago (``2d``), ``20:15``, or a date and time.

    Without an offset it is in the zone that the command prints. Raises click.BadParameter.
    """
    if isinstance(value, int):
        return value
    now = datetime.datetime.now(datetime.UTC).astimezone()
    text = value.strip()
    if text.lower() == "now":
        return clock.now_ns()
    try:
        return clock.now_ns() - round(seconds(text) * 1e9)
    except click.BadParameter:
        pass
    try:
        if re.fullmatch(r"\d\d?:\d\d(:\d\d)?", text, re.ASCII):
            when = datetime.datetime.combine(now, datetime.time.fromisoformat(text.zfill(5)))
            if when.astimezone() > now:
                when -= datetime.timedelta(days=1)
        else:
            when = datetime.datetime.fromisoformat(text)
        return round(when.timestamp()) * 1_000_000_000
    except (ValueError, OverflowError, OSError):
        raise click.BadParameter(
            f"{value!r} is no time: 2h (ago), 20:15, 2026-09-21T20:15, 2026-09-21T20:15:00+02:00"
        ) from None


def _use_utc(ctx: click.Context, _option: click.Parameter, given: bool) -> bool:
    """Make UTC the zone of this process until the command ends.

    One place instead of an argument of every view: a screen with times of two zones would mislead.
    """
    if given:
        before = os.environ.get("TZ")
        os.environ["TZ"] = "UTC0"
        time.tzset()
        ctx.call_on_close(functools.partial(_set_zone, before))
    return given


def _set_zone(name: str | None) -> None:
    if name is None:
        os.environ.pop("TZ", None)
    else:
        os.environ["TZ"] = name
    time.tzset()


utc_option = click.option(
    "--utc",
    is_flag=True,
    is_eager=True,  # before options that are times
    expose_value=False,
    callback=_use_utc,
    help="Show times in UTC instead of this host's zone.",
)
source_option = click.option(
    "--source",
    type=click.Choice(sources.CHOICES),
    default="auto",
    show_default=True,
    help="bpf: eBPF programs; ftrace: tracefs, without BPF; auto: the one that sees more.",
)
interval_option = click.option(
    "--interval",
    type=seconds,
    default=1.0,
    metavar="DURATION",
    help="Time between two updates.  [default: 1s]",
)
duration_option = click.option(
    "--duration", type=seconds, metavar="DURATION", help="Stop after this long (10s, 1h30m, 2d)."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


from_option = click.option(
    "--from",
    "recording",
    type=click.Path(dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Read a recording or a bundle (also .gz; - is standard input) instead of this host.",
)
watch_option = click.option(
    "--duration",
    type=seconds,
    default=5.0,
    metavar="DURATION",
    help="How long to watch this host.  [default: 5s]",
)
