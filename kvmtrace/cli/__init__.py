"""The command line: commands, their options, and the one place where errors become text.

The two views with libraries of their own are imported by the command that needs them, and sources
by ``open_source``: ``events`` on a small host needs neither a TUI library nor bcc.
"""

from __future__ import annotations

import os

import click

from kvmtrace import __version__
from kvmtrace.cli.compile import compile_
from kvmtrace.cli.doctor import doctor
from kvmtrace.cli.errors import Group, stop
from kvmtrace.cli.live import events, serve, top
from kvmtrace.cli.logs import bundle, explain, record, replay


def main() -> None:
    """The console script."""
    stop.owns_process = True
    try:
        cli(prog_name="kvmtrace")
    finally:
        if stop.hung:
            os._exit(1)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvmtrace")
def cli() -> None:
    """Which VMs hold poisoned memory, was the VMM notified, and is it over?

    Shell completion: eval "$(_KVMTRACE_COMPLETE=bash_source kvmtrace)" (or zsh_source).
    """


for command in (top, events, serve, record, replay, explain, bundle, doctor, compile_):
    cli.add_command(command)
