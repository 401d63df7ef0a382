"""`python -m tests.lab`: prepare or list the lab's kernels, or open a shell on one of them."""

from __future__ import annotations

import argparse
import contextlib
import sys

from tests.lab.config import rows
from tests.lab.errors import LabError, status_of
from tests.lab.machine import DEFAULT, Machine, prepare
from tests.lab.progress import print_status


def _prepare(names: list[str]) -> int:
    for name in names:
        made = prepare(name)
        print_status(
            f"{name}: Linux {made.kernel.release}, root {made.row.root.name}, {made.qemu.version}"
        )
    return 0


def _list() -> int:
    for row in rows().values():
        kernel = f"{row.suite} {row.version or 'newest'} {row.flavour}"
        print(f"{row.name:20} {row.root.name:10} {kernel:36} {row.why}")
    return 0


def _shell(name: str, cmdline: str, lacking: list[str]) -> int:
    with Machine.boot(name, cmdline_extra=cmdline, lacking=lacking) as machine:
        print_status(f"{name}: Linux {machine.release}, up in {machine.boot_seconds:.1f} s")
        if not sys.stdin.isatty():
            result = machine.run(["bash"], timeout=3600, stdin=sys.stdin.read())
            sys.stdout.write(result.stdout)
            sys.stderr.write(result.stderr)
            return result.status
        with contextlib.suppress(LabError):
            print_status(f"{machine.share} on this host is /mnt/share in the machine")
        print_status("exit or Ctrl-D powers the machine off")
        return machine.attach(["bash", "--login"])


def main() -> int:
    """Run the subcommand that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser(
        "prepare", help="download and build everything that a machine needs"
    )
    preparing.add_argument("--kernel", nargs="+", default=[DEFAULT], metavar="NAME")
    preparing.add_argument("--all", action="store_true", help="every kernel of kernels.toml")
    shell = commands.add_parser("shell", help="boot a machine and get a root shell in it")
    shell.add_argument("--kernel", default=DEFAULT, metavar="NAME")
    shell.add_argument("--cmdline", default="", help="append to the kernel's command line")
    shell.add_argument(
        "--lacking", action="append", default=[], metavar="NAME", help="boot without it (bcc)"
    )
    commands.add_parser("list", help="list the kernels of kernels.toml")
    chosen = parser.parse_args()
    if chosen.command == "prepare":
        return _prepare(list(rows()) if chosen.all else chosen.kernel)
    if chosen.command == "shell":
        return _shell(chosen.kernel, chosen.cmdline, chosen.lacking)
    return _list()


if __name__ == "__main__":
    sys.exit(status_of(main))
