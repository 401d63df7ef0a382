"""The command line: a module for each command, and the one place where errors become text.

Views with libraries of their own are imported by the command that needs them, and sources by
``open_source``: ``events`` on a small host needs neither a TUI library nor bcc.
"""

from __future__ import annotations

import os

import click

from kvmtrace import __version__
from kvmtrace.cli.bundle import bundle
from kvmtrace.cli.check import check
from kvmtrace.cli.compile import compile_
from kvmtrace.cli.doctor import doctor
from kvmtrace.cli.errors import Group
from kvmtrace.cli.events import events
from kvmtrace.cli.explain import explain
from kvmtrace.cli.record import record
from kvmtrace.cli.replay import replay
from kvmtrace.cli.serve import serve
from kvmtrace.cli.signals import stop
from kvmtrace.cli.top import top


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

    A VMM is the process that runs a VM, for instance QEMU.

    \b
    Shell completion (or zsh_source):
      eval "$(_KVMTRACE_COMPLETE=bash_source kvmtrace)"
    """


for command in (top, events, serve, record, replay, explain, check, bundle, doctor, compile_):
    cli.add_command(command)
