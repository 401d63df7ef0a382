"""Options that several commands take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import click

from kvmtrace import sources

P = ParamSpec("P")
R = TypeVar("R")

_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(value: str | float) -> float:
    """A duration in seconds, greater than zero: ``0.5``, ``10``, ``10s``, ``5m``, ``1h``.

    Raises click.BadParameter. A function, as click's ParamType is generic in new releases only.
    """
    if isinstance(value, float):
        return value
    text, unit = value, 1
    if text[-1:] in _UNITS:
        text, unit = text[:-1], _UNITS[text[-1]]
    try:
        number = float(text) * unit
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a number of seconds") from None
    if not 0 < number < 1e9:  # NaN too
        raise click.BadParameter(f"{value!r} is not between 0 and 1e9 seconds")
    return number


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
    metavar="SECONDS",
    help="Time between two updates.  [default: 1]",
)
duration_option = click.option(
    "--duration", type=seconds, metavar="SECONDS", help="Stop after this long (10, 5m, 1h)."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def with_source(command: Callable[P, R]) -> Callable[P, R]:
    """Add ``--source`` as the last option."""
    return functools.wraps(command)(source_option(command))


from_option = click.option(
    "--from",
    "recording",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Read a recording instead of this host.",
)
watch_option = click.option(
    "--duration",
    type=seconds,
    default=5.0,
    metavar="SECONDS",
    help="How long to watch this host.  [default: 5]",
)
utc_option = click.option(
    "--utc", is_flag=True, help="Show times in UTC.  [default: local time, with its offset]"
)
