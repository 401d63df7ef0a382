"""The command line: commands, their options, and the one place where errors become text.

The two views with libraries of their own are imported by the command that needs them, and sources
by ``open_source``: ``events`` on a small host needs neither a TUI library nor bcc.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO, Any, ParamSpec, TypeVar

import click

from kvmtrace import __version__, door, host, identity, sources, wire
from kvmtrace.correlate import Correlator, Told
from kvmtrace.errors import KvmtraceError, UsageError
from kvmtrace.events import Event, VmSeen
from kvmtrace.live import Session, host_of
from kvmtrace.model import Host, Probe, Snapshot
from kvmtrace.observe import Observed
from kvmtrace.reactions import Reactions
from kvmtrace.sources.recording import RecordingSource, Writer
from kvmtrace.views import bundle as bundle_view
from kvmtrace.views import doctor as doctor_view
from kvmtrace.views import explain as explain_view
from kvmtrace.views import lines, targets
from kvmtrace.views.header import watching_text
from kvmtrace.views.table import table_text

P = ParamSpec("P")
R = TypeVar("R")

WIDTH_WITHOUT_TERMINAL = 160
POLL_SECONDS = 0.25


def main() -> None:
    """The console script."""
    cli(prog_name="kvmtrace")


# -- errors and signals


class _Failure(click.ClickException):
    """A KvmtraceError on its way out through click."""

    def __init__(self, error: KvmtraceError) -> None:
        super().__init__(error.message)
        # Click's own exceptions assign it too, although it is declared for the class.
        self.exit_code = error.exit_status  # type: ignore[misc]
        self.hint = error.hint

    def show(self, file: IO[Any] | None = None) -> None:
        """``kvmtrace: MESSAGE`` and ``hint: HINT`` on stderr."""
        click.echo(f"kvmtrace: {self.message}", err=True)
        if self.hint:
            click.echo(f"hint: {self.hint}", err=True)


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; whatever goes wrong becomes one line and an exit status, here only."""
        _survive_any_name(sys.stdout)
        _survive_any_name(sys.stderr)
        try:
            with stop:
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (BrokenPipeError, _Interrupted):
            # The reader has left, or asked us to: nothing more can or need be said.
            _discard_stdout()
            return None
        except Exception as error:
            if os.environ.get("KVMTRACE_DEBUG"):
                traceback.print_exc()
            raise _Failure(_as_kvmtrace_error(error)) from error


def _as_kvmtrace_error(error: Exception) -> KvmtraceError:
    if isinstance(error, KvmtraceError):
        return error
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return KvmtraceError(f"{where}{error.strerror}", "KVMTRACE_DEBUG=1 shows where")
    return KvmtraceError(
        f"internal error: {type(error).__name__}: {error}",
        "KVMTRACE_DEBUG=1 shows a traceback; please report it",
    )


class _Interrupted(BaseException):
    """A signal arrived while we were blocked in a write."""


class _Stop:
    """SIGINT, SIGTERM and SIGHUP as a flag that loops look at, so that probes are always detached.

    An exception out of nowhere could hit a half-attached source or a C callback. Writing is the
    exception: a reader that stopped reading would otherwise keep us for ever.
    """

    def __init__(self) -> None:
        self.asked = False
        self._writing: IO[str] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        self.asked = False
        with contextlib.suppress(ValueError):  # not the main thread (tests)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self._previous[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        if self._writing is not None and _nobody_reads(self._writing):
            raise _Interrupted

    def write(self, text: str, file: IO[str]) -> None:
        """Print a line and flush it; a signal ends it even if nobody reads.

        After a signal, the last lines still go out as long as somebody does.
        """
        self._writing = file
        try:
            if self.asked and _nobody_reads(file):
                raise _Interrupted
            file.write(text + "\n")
            file.flush()
        finally:
            self._writing = None


def _nobody_reads(file: IO[str]) -> bool:
    """Whether there is no room to write, nor any within a second."""
    try:
        poller = select.poll()
        poller.register(file.fileno(), select.POLLOUT)
        return not poller.poll(1000)
    except (OSError, ValueError):
        return False  # not a file (tests)


stop = _Stop()


def _print(text: str) -> None:
    stop.write(text, sys.stdout)


def _survive_any_name(stream: IO[str]) -> None:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def _json_is_utf8() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


def _discard_stdout() -> None:
    """Let the interpreter's own last flush go nowhere, rather than complain of a broken pipe."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


# -- options


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

_source_option = click.option(
    "--source",
    type=click.Choice(sources.CHOICES),
    default="auto",
    show_default=True,
    help="How to attach: eBPF, or tracefs without BPF; auto takes bpf where it works.",
)
_interval_option = click.option(
    "--interval",
    type=SECONDS,
    default=1.0,
    metavar="SECONDS",
    help="Time between two looks. [default: 1]",
)
_duration_option = click.option(
    "--duration", type=SECONDS, metavar="SECONDS", help="Stop after this long (10, 5m, 1h)."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="For programs.")


def _with_source(command: Callable[P, R]) -> Callable[P, R]:
    return functools.wraps(command)(_source_option(command))


def _attach(kind: str) -> sources.Source:
    """This host's kernel, with what only looking tells added to what it says by itself."""
    return Reactions(Observed(sources.open_source(kind)))


@contextlib.contextmanager
def _session(kind: str) -> Iterator[Session]:
    """A session on this host's kernel, detached on every way out."""
    session = Session(_attach(kind))
    try:
        yield session
    finally:
        session.close()


# -- commands


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvmtrace")
def cli() -> None:
    """Which VMs hold poisoned memory, was the VMM told, and is it over?

    Shell completion: eval "$(_KVMTRACE_COMPLETE=bash_source kvmtrace)" (or zsh_source).
    """


@cli.command()
@click.option("--once", is_flag=True, help="Watch for one interval, print the table, exit.")
@_json_option
@_interval_option
@_with_source
def top(once: bool, as_json: bool, interval: float, source: str) -> None:
    """Live table of VMs and poison incidents (needs a terminal, or --once).

    --json goes with --once and prints one object.
    """
    if as_json and not once:
        raise UsageError("--json goes with --once", "`kvmtrace events --json` streams")
    if once:
        _top_once(source, interval, as_json)
        return
    if not _on_terminal():
        raise UsageError(
            "top needs a terminal", "`kvmtrace top --once` prints the table, `events` follows"
        )
    from kvmtrace.views import top as view  # noqa: PLC0415 (a TUI library)

    with _session(source) as session:
        session.start()
        view.run(session.snapshot, interval)


def _top_once(source: str, interval: float, as_json: bool) -> None:
    with _session(source) as session:
        deadline = time.monotonic() + interval
        while not stop.asked and (left := deadline - time.monotonic()) > 0:
            session.pump(min(left, POLL_SECONDS))
        snapshot = session.snapshot()
    _show_snapshot(snapshot, time.time_ns(), as_json)


def _show_snapshot(snapshot: Snapshot, now: int, as_json: bool) -> None:
    if as_json:
        _json_is_utf8()
        _print(json.dumps(wire.top(snapshot), ensure_ascii=False))
        return
    width = shutil.get_terminal_size((WIDTH_WITHOUT_TERMINAL, 24)).columns
    _print(table_text(snapshot, now=now, width=width))


def _on_terminal() -> bool:
    if os.environ.get("TERM", "dumb") == "dumb":
        return False
    return all(
        stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)
    )


@cli.command()
@_json_option
@click.option(
    "--vm",
    metavar="PID|NAME",
    help="Only what concerns this VM (and what was lost). It must be known at the start, or be "
    "the pid of a live process.",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="Stop after N lines.")
@_duration_option
@_with_source
def events(
    as_json: bool, vm: str | None, count: int | None, duration: float | None, source: str
) -> None:
    """One line per event, as it happens.

    --json prints one JSON object per line: integers as integers, what is unknown is absent.
    """
    text = lines.json_text if as_json else lines.event_text
    if as_json:
        _json_is_utf8()
    with _session(source) as session:
        deadline = time.monotonic() + duration if duration else None
        told = session.pump(0)
        if vm is not None:
            _require_vm(vm, told)
        click.echo(f"kvmtrace: {watching_text(session.snapshot())}", err=True)
        last_look = False
        while True:
            for one in told:
                if vm is not None and not _concerns(one, vm):
                    continue
                line = text(one)
                if line is None:
                    continue
                _print(line)
                if count is not None:
                    count -= 1
                    if not count:
                        return
            wait = POLL_SECONDS
            if deadline is not None:
                wait = min(wait, deadline - time.monotonic())
            if stop.asked or wait <= 0 or _reader_gone():
                if last_look:
                    return
                # What the kernel counted meanwhile and has not told yet belongs to this run.
                last_look, wait = True, 0
            told = session.pump(wait)


def _is(seen: VmSeen | None, vm: str) -> bool:
    return seen is not None and vm in (str(seen.pid), seen.name, seen.uuid)


def _concerns(told: Told, vm: str) -> bool:
    """Whether a line is about this VM; what was lost may have been."""
    return (
        _is(told.vm, vm)
        or any(_is(seen, vm) for _, seen in told.owners)
        or told.event.kind == "lost"
        or (told.event.kind == "sigbus" and vm == str(getattr(told.event, "pid", None)))
    )


def _require_vm(vm: str, told: list[Told]) -> None:
    if vm.isdecimal() and os.path.exists(f"/proc/{int(vm)}"):
        return
    known = {one.vm.name or str(one.vm.pid): one.vm for one in told if one.vm}
    if any(_is(seen, vm) for seen in known.values()):
        return
    names = set(known)
    for pid in identity.vm_processes():
        found = identity.identify(pid)
        if vm in (found.name, found.uuid):
            return
        names.add(found.name or str(pid))
    listed = ", ".join(sorted(names)[:8]) + (", …" if len(names) > 8 else "")
    raise UsageError(
        f"no VM {identity.clean(vm)!r} here", f"there are: {listed}" if names else "none is running"
    )


def _reader_gone() -> bool:
    """Whether stdout is a pipe that nobody will read any more, before there is a line to write."""
    try:
        poller = select.poll()
        poller.register(sys.stdout.fileno(), 0)
        return any(what & select.POLLERR for _, what in poller.poll(0))
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _door(session: Session) -> Iterator[None]:
    """Let other commands ask what this session saw; without it where another serve answers."""

    def answer() -> str:
        snapshot = session.snapshot()
        log = io.StringIO()
        if snapshot.host is not None:
            Writer(log, snapshot.host).write(session.history(), snapshot.probes)
        return log.getvalue()

    try:
        answering = door.Door(answer)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        answering.close()


@cli.command()
@click.option(
    "--listen",
    metavar="[HOST:]PORT",
    help="Where to serve; ':PORT' is every address, port 0 a free one.  [default: 127.0.0.1:9750]",
)
@click.option(
    "--max-vms",
    type=click.IntRange(min=1),
    metavar="N",
    help='VMs with series of their own; the rest share vm="other".  [default: 500]',
)
@_with_source
def serve(listen: str | None, max_vms: int | None, source: str) -> None:
    """Serve /metrics for Prometheus, /-/healthy and a landing page."""
    from kvmtrace.views import exporter  # noqa: PLC0415 (prometheus_client)

    def kinds() -> list[tuple[str, str]]:
        types, results = host.memory_failure_names()
        return [(kind, result) for kind in types.values() for result in results.values()]

    with _session(source) as session, _door(session):
        server = exporter.serve(
            listen or exporter.DEFAULT_LISTEN,
            session,
            kinds=kinds,
            max_vms=max_vms or exporter.DEFAULT_MAX_VMS,
        )
        try:
            session.start()
            click.echo(f"serving {server.url}/metrics", err=True)
            while not stop.asked and session.failure is None:
                time.sleep(POLL_SECONDS)
            if session.failure is not None:
                raise session.failure
        finally:
            server.close()


@cli.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@_duration_option
@_with_source
def record(file: str, force: bool, duration: float | None, source: str) -> None:
    """Write the event log to FILE (JSON lines), for `kvmtrace replay`."""
    attached = _attach(source)
    try:
        number = 0
        deadline = time.monotonic() + duration if duration else None
        with _create(file, force) as out:
            writer = Writer(out, host_of(attached))
            click.echo(f"recording to {file}; Ctrl-C ends it", err=True)
            while True:
                wait = POLL_SECONDS
                if deadline is not None:
                    wait = min(wait, deadline - time.monotonic())
                if stop.asked or wait <= 0:
                    break
                batch = attached.poll(wait)
                writer.write(batch, attached.probes())
                out.flush()
                number += len(batch)
        click.echo(f"{number} events", err=True)
    finally:
        attached.close()


def _create(path: str, force: bool, *, binary: bool = False) -> IO[Any]:
    """For root's eyes only: a recording holds addresses of other people's guests."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if force else os.O_EXCL)
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        raise KvmtraceError(f"{path} is already there", "--force replaces it") from None
    return open(descriptor, "wb") if binary else open(descriptor, "w", encoding="utf-8")


@cli.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--events", "as_events", is_flag=True, help="The event lines, not the table.")
@_json_option
def replay(file: str, as_events: bool, as_json: bool) -> None:
    """Show a recording: the final table, or with --events what happened line by line.

    Needs no privilege, no BPF and no KVM.
    """
    if as_json:
        _json_is_utf8()
    text = lines.json_text if as_json else lines.event_text
    source = RecordingSource(file)
    session = Session(source)
    try:
        while not source.done and not stop.asked:
            for told in session.pump(0):
                if as_events and (line := text(told)) is not None:
                    _print(line)
        if not as_events:
            snapshot = dataclasses.replace(session.snapshot(), host=source.host)
            _show_snapshot(snapshot, snapshot.last_ts or 0, as_json)
        if source.truncated:
            click.echo(f"kvmtrace: {file}: the last line is cut off; left out", err=True)
    finally:
        session.close()


_from_option = click.option(
    "--from",
    "recording",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="A recording, instead of this host.",
)
_look_option = click.option(
    "--duration",
    type=SECONDS,
    default=5.0,
    metavar="SECONDS",
    help="How long to watch this host.  [default: 5]",
)


def _events_of(
    recording: str | None, source: str, duration: float
) -> tuple[list[Event], Host, tuple[Probe, ...]]:
    """All events of a recording, of a running serve, or else what this host says in a while."""
    batch: list[Event] = []
    with contextlib.ExitStack() as kept:
        if recording is None and (known := door.ask()) is not None:
            file = kept.enter_context(tempfile.NamedTemporaryFile("w", encoding="utf-8"))
            file.write(known)
            file.flush()
            recording = file.name
        replayed = RecordingSource(recording) if recording is not None else None
    if replayed is not None:
        try:
            while not replayed.done and not stop.asked:
                batch += replayed.poll(0)
            return batch, replayed.host, replayed.probes()
        finally:
            replayed.close()
    attached = _attach(source)
    try:
        deadline = time.monotonic() + duration
        while not stop.asked and (left := deadline - time.monotonic()) > 0:
            batch += attached.poll(min(left, POLL_SECONDS))
        return batch + attached.poll(0), host_of(attached), attached.probes()
    finally:
        attached.close()


def _model(events: list[Event], host: Host, probes: tuple[Probe, ...]) -> Snapshot:
    correlator = Correlator()
    for event in events:
        correlator.feed(event)
    return dataclasses.replace(correlator.snapshot(), host=host, probes=probes)


@cli.command()
@click.argument("target", metavar="PFN|GPA@VM|VM|INCIDENT")
@_from_option
@_json_option
@_look_option
@_with_source
def explain(
    target: str, recording: str | None, as_json: bool, duration: float, source: str
) -> None:
    """The whole story of a page or a VM: what failed, who was told, what they did, what to do.

    Numbers are PFNs (0x103275) or, with @VM, guest physical addresses (0x8000@web-1).
    """
    snapshot = _model(*_events_of(recording, source, duration))
    found = targets.find(snapshot, target)
    if as_json:
        _json_is_utf8()
        _print(json.dumps([explain_view.as_object(i, snapshot) for i in found], ensure_ascii=False))
        return
    texts = [explain_view.explain_text(incident, snapshot) for incident in found]
    _print("\n\n".join(texts) or targets.about_nothing(snapshot, target))


@cli.command()
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), required=True, metavar="FILE.tar.gz"
)
@click.option("--redact", is_flag=True, help="Replace names and uuids of VMs, the same everywhere.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@_from_option
@_look_option
@_with_source
def bundle(
    *,
    output: str,
    redact: bool,
    force: bool,
    recording: str | None,
    duration: float,
    source: str,
) -> None:
    """Everything about this host's incidents in one file, for a ticket or an RMA.

    Events as a recording, all incidents explained, doctor's findings, versions.
    """
    said, of, probes = _events_of(recording, source, duration)
    names = bundle_view.Redaction(said)
    if redact:
        said = names.events(said)
    log = io.StringIO()
    Writer(log, of).write(said, probes)
    files = bundle_view.contents(log.getvalue(), _model(said, of, probes), host.bcc().version)
    if recording is None:
        report = doctor_view.judge(host.examine(), [_attempt(kind) for kind in _kinds(source)])
        text = doctor_view.render(report)
        files["doctor.txt"] = names.text(text) if redact else text
    with _create(output, force, binary=True) as out:
        bundle_view.write(out, files, int(time.time()))
    click.echo(f"{output}: {', '.join(sorted(files))}", err=True)


@cli.command()
@_json_option
@_source_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, source: str) -> None:
    """What this host offers and what is missing, each with the fix.

    Attaches for a moment to see what can be attached. Exit status 0 only if memory-fault exits
    can be seen here.
    """
    report = doctor_view.judge(host.examine(), [_attempt(kind) for kind in _kinds(source)])
    if as_json:
        _json_is_utf8()
        _print(json.dumps(doctor_view.as_object(report), ensure_ascii=False))
    else:
        _print(doctor_view.render(report, ascii_only=not _can_print("✓✗→")))
    ctx.exit(0 if report.ok else 1)


def _kinds(source: str) -> tuple[str, ...]:
    return ("bpf", "ftrace") if source == "auto" else (source,)


def _attempt(kind: str) -> doctor_view.Attempt:
    """Attach, look, detach. Whatever goes wrong is a finding here."""
    try:
        source = sources.open_source(kind)
        try:
            source.poll(0)
            return doctor_view.Attempt(kind, source.probes())
        finally:
            source.close()
    except Exception as error:
        failure = _as_kvmtrace_error(error)
        return doctor_view.Attempt(kind, refused=failure.message, hint=failure.hint)


def _can_print(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True
