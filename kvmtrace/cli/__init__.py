"""The command line: a module for each command, which is imported if the command is run.

Views with libraries of their own are imported by the command that needs them, and sources by
``open_source``: ``events`` on a small host needs neither a TUI library nor bcc.
"""

from __future__ import annotations

import os

import click

from kvmtrace import __version__
from kvmtrace.cli.help import GroupedCommands
from kvmtrace.cli.signals import stop


def main() -> None:
    stop.owns_process = True
    try:
        cli(prog_name="kvmtrace")
    finally:
        if stop.hung:
            os._exit(1)


@click.group(
    cls=GroupedCommands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""
    Each option can also be set by a variable of its name (KVMTRACE_TOP_INTERVAL=2s, KVMTRACE_UTC=1)
    or in the configuration file. The command line counts first, then variables, then the file.

    \b
    Shell completion, also of VMs and incidents (or zsh_source, fish_source):
      eval "$(_KVMTRACE_COMPLETE=bash_source kvmtrace)"
    """,
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(),
    metavar="FILE",
    help="Take settings from this file, not from /etc/kvmtrace/kvmtrace.toml (KVMTRACE_CONFIG).",
)
@click.version_option(__version__, prog_name="kvmtrace", allow_from_autoenv=False)
def cli(config_file: str | None) -> None:
    """Which VMs hold poisoned memory, was the VMM notified, and is it over?

    A VMM is the process that runs a VM, for instance QEMU.
    """


cli.add(
    "Look",
    "top",
    "kvmtrace top",
    "kvmtrace top --once",
    "kvmtrace top --once --from sick.jsonl --at 5m",
)
cli.add(
    "Look",
    "explain",
    "kvmtrace explain web-1",
    "kvmtrace explain 0x4f2311",
    "kvmtrace explain --since 7d",
    "kvmtrace explain 0x1f000000@web-1 --from sick.jsonl",
)
cli.add(
    "Look",
    "events",
    "kvmtrace events --since 2h --kind poison,sigbus",
    "kvmtrace events --count 1 --duration 1h30m",
    "kvmtrace events --vm web-1 --json",
)
cli.add(
    "Look",
    "replay",
    "kvmtrace replay sick.jsonl",
    "kvmtrace replay --events --state looping sick.jsonl",
)
cli.add("Run", "serve", "kvmtrace serve", "kvmtrace serve --max-vms 1000")
cli.add("Run", "compile", "kvmtrace compile")
cli.add(
    "Run", "assets", "kvmtrace assets unit --to DIR", "kvmtrace assets rules --to kvmtrace-files"
)
cli.add(
    "Keep",
    "record",
    "kvmtrace record sick.jsonl --duration 1h30m",
    "kvmtrace record --since 2h -o case.jsonl",
)
cli.add(
    "Keep",
    "bundle",
    "kvmtrace bundle -o case.tar.gz --redact",
    "kvmtrace bundle -o case.tar.gz --from sick.jsonl",
)
cli.add("Check", "check", "kvmtrace check", "kvmtrace check --from sick.jsonl")
cli.add("Check", "config", "kvmtrace config check", "kvmtrace config check kvmtrace.toml")
cli.add("Check", "doctor", "kvmtrace doctor", "kvmtrace doctor --verbose")
