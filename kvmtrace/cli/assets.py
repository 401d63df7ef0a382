"""``kvmtrace assets``: files for the host's other services."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import click

from kvmtrace import data_files
from kvmtrace.cli.console import print_line
from kvmtrace.errors import KvmtraceError

_PACKAGED = "/usr/bin/kvmtrace"


def _unit() -> dict[str, str]:
    """The unit, which starts the kvmtrace that wrote it, and the group for its socket."""
    found = data_files.directory("assets")
    ours = shutil.which(sys.argv[0]) or _PACKAGED
    text = (found / "kvmtrace.service").read_text()
    return {
        "kvmtrace.service": text.replace(f"ExecStart={_PACKAGED} ", f"ExecStart={ours} "),
        "kvmtrace.socket": (found / "kvmtrace.socket").read_text(),
        "kvmtrace.sysusers": (found / "kvmtrace.sysusers").read_text(),
    }


def _files(directory: str, *names: str) -> Callable[[], dict[str, str]]:
    return lambda: {name: (data_files.directory(directory) / name).read_text() for name in names}


# {kind: (its files, what to do with them)}
_KINDS: dict[str, tuple[Callable[[], dict[str, str]], str]] = {
    "unit": (
        _unit,
        "kvmtrace.service and kvmtrace.socket go to /etc/systemd/system, kvmtrace.sysusers to"
        " /etc/sysusers.d/kvmtrace.conf; then: systemd-sysusers && systemctl daemon-reload &&"
        " systemctl enable --now kvmtrace",
    ),
    "config": (
        _files("assets", "kvmtrace.toml"),
        "it goes to /etc/kvmtrace, owned by root; then: kvmtrace config check",
    ),
    "rules": (
        _files("dashboards", "alerts.yml"),
        "name it under rule_files in prometheus.yml",
    ),
    "dashboards": (
        _files("dashboards", "kvmtrace-host.json"),
        "import it in Grafana, or put it into a directory that Grafana provisions",
    ),
    "container": (
        _files("assets/container", "Containerfile", "kvmtrace-daemonset.yaml"),
        "put kvmtrace_*_all.deb beside them; then: podman build -t kvmtrace . and, with the image's"
        " name in it, kubectl apply -f kvmtrace-daemonset.yaml",
    ),
    "scrape-config": (
        _files("assets", "scrape-config.yml"),
        "its job goes under scrape_configs in prometheus.yml",
    ),
}


@click.command()
@click.argument("kind", type=click.Choice(list(_KINDS)))
@click.option(
    "--to",
    "directory",
    default=".",
    metavar="DIR",
    help="Where to write them.  [default: here]",
)
@click.option("--force", is_flag=True, help="Replace files that are there.")
def assets(kind: str, directory: str, force: bool) -> None:
    """Write a unit, its configuration, alert rules, the dashboard, a scrape job or a container.

    Debian's package has them in place already.
    """
    make, what_next = _KINDS[kind]
    into = Path(directory)
    for name, text in make().items():
        path = into / name
        try:
            into.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if force else os.O_EXCL)
            # Not secret: other services read them.
            descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise KvmtraceError(f"{path} already exists", "--force replaces it") from None
        except OSError as error:
            raise KvmtraceError(f"{path}: {error.strerror}", "--to names a directory") from None
        print_line(f"{path}")
    print_line(what_next)
