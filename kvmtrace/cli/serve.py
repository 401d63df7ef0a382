"""``kvmtrace serve``: the exporter, and the feed for other commands."""

from __future__ import annotations

import gc
import resource
import time

import click

from kvmtrace.cli.console import print_status
from kvmtrace.cli.hooks import open_hooks, program
from kvmtrace.cli.inputs import POLL_SECONDS, give_up_privileges, open_host, open_session
from kvmtrace.cli.options import days, seconds, source_option
from kvmtrace.cli.signals import stop
from kvmtrace.linux import clock
from kvmtrace.linux.tracefs import mount
from kvmtrace.session.session import host_of
from kvmtrace.sources import Source


@click.command()
@click.option(
    "--listen",
    metavar="[HOST:]PORT",
    help="Where to listen: PORT on loopback only, :PORT on every address. Port 0 picks a free "
    "one.  [default: 127.0.0.1:9750]",
)
@click.option(
    "--max-vms",
    type=click.IntRange(min=1),
    metavar="N",
    help='How many VMs get series of their own; the others share vm="other".  [default: 500]',
)
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="On loopback, also answer requests for this host name (for a proxy that passes it on).",
)
@click.option(
    "--web.config.file",
    "web_config",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="TLS, client certificates and basic auth for TCP, in the format of Prometheus' exporters.",
)
@click.option(
    "--log-format",
    type=click.Choice(["auto", "text", "json", "journal"]),
    default="auto",
    show_default=True,
    help="A log line for each change of an incident; auto: the journal where stderr leads there.",
)
@click.option(
    "--history",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Keep all events there, and go on after a restart.  [default: history.db in the service's "
    "state directory, if it has one]",
)
@click.option(
    "--history-days",
    type=days,
    default=90,
    show_default=True,
    metavar="DAYS",
    help="Delete older events.",
)
@click.option(
    "--history-size",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="MIB",
    help="Delete the oldest events of a larger file.",
)
@click.option(
    "--on-incident",
    type=program,
    metavar="COMMAND",
    help="Run this program for each change of an incident, with the incident as JSON on stdin.",
)
@click.option(
    "--hook-timeout",
    type=seconds,
    default=30.0,
    metavar="DURATION",
    help="Kill that program after so long.  [default: 30s]",
)
@source_option
def serve(
    *,
    listen: str | None,
    max_vms: int | None,
    allow_host: tuple[str, ...],
    web_config: str | None,
    log_format: str,
    history: str | None,
    history_days: float,
    history_size: int,
    on_incident: tuple[str, ...] | None,
    hook_timeout: float,
    source: str,
) -> None:
    """Serve metrics for Prometheus, /-/healthy and a landing page.

    Other commands on this host connect to it and do not attach probes of their own. Each change of
    an incident is logged on stderr, or in the journal.
    """
    # Other commands need neither the log, nor SQLite, nor prometheus_client.
    from kvmtrace.cli.doors import Doors, open_server  # noqa: PLC0415
    from kvmtrace.cli.service import Service  # noqa: PLC0415
    from kvmtrace.session import archive_file  # noqa: PLC0415
    from kvmtrace.session.archive import Archive  # noqa: PLC0415
    from kvmtrace.session.resumed import ResumedSource  # noqa: PLC0415
    from kvmtrace.views.web import metrics  # noqa: PLC0415

    def kinds() -> list[tuple[str, str]]:
        types, results = mount.memory_failure_names()
        return [(kind, result) for kind in types.values() for result in results.values()]

    doors = Doors(listen, web_config, allow_host)
    watched: Source = open_host(source)
    archive = None
    if path := history or archive_file.default_path():
        archive = Archive(
            path, host_of(watched), print_status, days=history_days, size=history_size << 20
        )
        stop.clean_up.append(archive.close)
        past, first_key = archive.begin()
        watched = ResumedSource(watched, past, archive, clock.now_ns, first_key)
    with (
        open_session(watched) as session,
        open_hooks(on_incident, hook_timeout) as hooks,
        open_server(
            session,
            doors,
            kinds=kinds,
            max_vms=max_vms or metrics.DEFAULT_MAX_VMS,
            hooks=hooks.counts if hooks else None,
            started=False,
        ) as (server, pages),
    ):
        pages.is_ready = False
        give_up_privileges()
        # A client may have waited on the socket: it is answered with what was, too.
        session.pump(0)
        gc.freeze()  # nothing of what is there now ends before the process does
        server.start()
        if archive is not None:
            archive.start()
        if hooks is not None:
            hooks.start()
        session.start()
        service = Service(session, log_format, hooks)
        pages.is_ready = True
        print_status(f"serving {server.url}/metrics")
        service.ready()
        warned = False
        while not stop.requested and session.failure is None:
            time.sleep(POLL_SECONDS)
            service.look()
            if not warned and (session.shortages or server.dropped["descriptors"]):
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                print_status(
                    f"kvmtrace: no file descriptors left (limit {limit}): events may be lost"
                )
                warned = True
        pages.is_ready = False
        service.ending()
        if session.failure is not None:
            raise session.failure
