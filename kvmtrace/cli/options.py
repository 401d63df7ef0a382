"""Options that several commands take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import click

from kvmtrace import sources

P = ParamSpec("P")
R = TypeVar("R")


class _Seconds(click.ParamType[float]):
    """A duration greater than zero: ``0.5``, ``10``, ``10s``, ``5m``, ``1h``."""

    name = "seconds"
    _units = {"s": 1, "m": 60, "h": 3600}  # noqa: RUF012 (never written)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        text, unit = str(value), 1
        if text[-1:] in self._units:
            text, unit = text[:-1], self._units[text[-1]]
        try:
            seconds = float(text) * unit
        except ValueError:
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        if not 0 < seconds < 1e9:  # NaN too
            self.fail(f"{value!r} is not more than 0 seconds", param, ctx)
        return seconds


SECONDS = _Seconds()

source_option = click.option(
    "--source",
    type=click.Choice(sources.CHOICES),
    default="auto",
    show_default=True,
    help="How to attach: eBPF, or tracefs without BPF; auto takes bpf where it works.",
)
interval_option = click.option(
    "--interval",
    type=SECONDS,
    default=1.0,
    metavar="SECONDS",
    help="Time between two looks. [default: 1]",
)
duration_option = click.option(
    "--duration", type=SECONDS, metavar="SECONDS", help="Stop after this long (10, 5m, 1h)."
)
json_option = click.option("--json", "as_json", is_flag=True, help="For programs.")


def with_source(command: Callable[P, R]) -> Callable[P, R]:
    return functools.wraps(command)(source_option(command))


from_option = click.option(
    "--from",
    "recording",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="A recording, instead of this host.",
)
look_option = click.option(
    "--duration",
    type=SECONDS,
    default=5.0,
    metavar="SECONDS",
    help="How long to watch this host.  [default: 5]",
)
