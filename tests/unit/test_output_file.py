"""Files that commands read and write: whose they are, who is at the other end, what goes wrong."""

from __future__ import annotations

import errno
import functools
import gc
import os
import select
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvmtrace import sources
from kvmtrace.cli import output_file, signals
from kvmtrace.cli.output_file import Output
from kvmtrace.events import Event, Exit, Host
from kvmtrace.sources import recording as recording_module
from kvmtrace.sources.recording import RecordingSource, Writer
from kvmtrace.vmm import identity
from tests.unit.command_line import invoke
from tests.unit.fake import PROBES, STORY, FakeSource

NOBODY = 65534
ROOT = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")


@pytest.fixture(autouse=True)
def source(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    source = FakeSource(STORY)
    monkeypatch.setattr(sources, "open_source", lambda kind: source)
    monkeypatch.setattr(identity, "vm_processes", lambda: {})
    return source


@pytest.fixture
def recording(tmp_path: Path, source: FakeSource) -> str:
    path = str(tmp_path / "recording")
    assert invoke("record", path, "--duration", "0.1").exit_code == 0
    return path


# -- --force replaces what is ours, and nothing else


def link(path: Path) -> None:
    path.symlink_to("elsewhere")


def link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _unchanged(path: Path) -> tuple[int, ...]:
    """What changes if a path is written to; following a link sets its access time."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_uid, found.st_size, found.st_mtime_ns


@needs_root
@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, link, link_to_a_pipe])
@pytest.mark.parametrize("command", [("record", "--duration", "0.1"), ("bundle", "-o")])
def test_what_somebody_else_put_there_is_left_alone(
    tmp_path: Path, make: Callable[[Path], None], command: tuple[str, ...], source: FakeSource
) -> None:
    path = tmp_path / "case"
    make(path)
    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    before = _unchanged(path)
    for force in ((), ("--force",)):
        result = invoke(*command, str(path), *force)
        assert result.exit_code == 1
        assert "hint: name another file, or remove what is there" in result.stderr
        assert _unchanged(path) == before
    assert not source.polls


@pytest.mark.parametrize("make", [link, link_to_a_pipe])
def test_a_link_of_ours_is_replaced_whatever_it_leads_to(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "case"
    make(path)
    assert invoke("record", str(path), "--force", "--duration", "0.1").exit_code == 0
    assert path.lstat().st_mode == stat.S_IFREG | 0o600


# -- signals end what waits for somebody at the other end

WAITING = """
import contextlib, os, sys
from kvmtrace import cli, sources
from kvmtrace.cli import signals
from tests.unit.fake import STORY, FakeSource

waiting = signals.stop.waiting

@contextlib.contextmanager
def announced(blocked):
    with waiting(blocked):
        os.write(2, b"waiting\\n")
        yield

signals.stop.waiting = announced
sources.open_source = lambda kind: FakeSource(STORY)
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "command",
    [
        ("record", "--force", "{pipe}"),
        ("replay", "{pipe}"),
        ("replay", "/dev/stdin"),
        ("explain", "web-1", "--from", "{pipe}"),
        ("bundle", "-o", "{new}", "--from", "{pipe}"),
    ],
)
def test_a_signal_ends_what_waits_for_a_pipe(
    tmp_path: Path, command: tuple[str, ...], number: signal.Signals
) -> None:
    os.mkfifo(tmp_path / "pipe")
    words = [word.format(pipe=tmp_path / "pipe", new=tmp_path / "new") for word in command]
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == b"waiting\n"
    process.send_signal(number)
    process.wait(30)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == [tmp_path / "pipe"]


def test_a_signal_ends_a_recording_that_nobody_reads() -> None:
    read, write = os.pipe()
    chatty = "\n".join(
        (
            "from kvmtrace import cli, sources",
            "from tests.unit.fake import STORY, FakeSource",
            "FakeSource.poll = lambda self, timeout: list(STORY) * 100",
            "sources.open_source = lambda kind: FakeSource()",
            "cli.main()",
        )
    )
    process = subprocess.Popen(
        [sys.executable, "-c", chatty, "record", "--force", "/dev/stdout"],
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    poller = select.poll()
    poller.register(write, select.POLLOUT)
    while poller.poll(0):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    os.close(read)
    os.close(write)
    assert process.returncode == 0
    assert b"ended by force" not in err


# -- errors name the file


@pytest.mark.parametrize("command", [("record", "--duration", "0.1"), ("bundle", "-o")])
def test_a_full_disk_is_reported_with_its_file(command: tuple[str, ...], recording: str) -> None:
    given = ("--from", recording) if command[0] == "bundle" else ()
    result = invoke(*command, "/dev/full", "--force", *given)
    assert result.exit_code == 1
    assert "kvmtrace: /dev/full: No space left on device\n" in result.stderr


def test_a_full_standard_output_is_reported(recording: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvmtrace", "replay", recording],
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr == b"kvmtrace: standard output: No space left on device\n"


def test_a_file_that_cannot_be_read_is_named() -> None:
    result = invoke("replay", "/proc/self/mem")
    assert (result.exit_code, result.stderr) == (
        1,
        "kvmtrace: /proc/self/mem: Input/output error\n"
        "hint: name a file that `kvmtrace record` or `kvmtrace bundle` made\n",
    )


# -- a file has its name once something is in it


@pytest.fixture(params=["unnamed", "named"])
def temporary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a file system that can make files without a name."""
    if request.param == "unnamed":
        return
    opened = os.open

    def no_unnamed(path: str, flags: int, *more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", no_unnamed)


def outputs(recording: str, path: Path, *more: str) -> Iterator[tuple[str, ...]]:
    yield "record", str(path), "--duration", "0.1", *more
    yield "bundle", "-o", str(path), "--from", recording, *more


@pytest.mark.usefixtures("temporary")
def test_files_are_made_and_replaced_on_any_file_system(recording: str, tmp_path: Path) -> None:
    path = tmp_path / "new"
    for command in outputs(recording, path):
        assert invoke(*command).exit_code == 0
        before = path.read_bytes()
        assert path.lstat().st_mode == stat.S_IFREG | 0o600
        refused = invoke(*command)
        assert (refused.exit_code, "already there" in refused.stderr) == (1, True)
        assert path.read_bytes() == before
        assert invoke(*command, "--force").exit_code == 0
        path.unlink()
    assert list(tmp_path.iterdir()) == [Path(recording)]


@pytest.mark.usefixtures("temporary")
def test_what_appears_meanwhile_is_left_alone(
    recording: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new"
    place = Output.place

    def late(output: Output) -> None:
        path.write_text("precious")
        place(output)

    monkeypatch.setattr(Output, "place", late)
    for command in outputs(recording, path):
        result = invoke(*command)
        assert result.exit_code == 1
        assert f"kvmtrace: {path} is already there\nhint: --force" in result.stderr
        assert path.read_text() == "precious"
        path.unlink()
    assert list(tmp_path.iterdir()) == [Path(recording)]


@needs_root
def test_what_somebody_else_puts_there_meanwhile_is_left_alone(
    recording: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new"
    place = Output.place

    def late(output: Output) -> None:
        path.write_text("theirs")
        os.chown(path, NOBODY, NOBODY)
        place(output)

    monkeypatch.setattr(Output, "place", late)
    for command in outputs(recording, path, "--force"):
        result = invoke(*command)
        assert result.exit_code == 1
        assert f"kvmtrace: {path} has just been replaced\n" in result.stderr
        assert path.read_text() == "theirs"
        path.unlink()


def test_a_killed_command_leaves_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, "bundle", "-o", tmp_path / "new", "--from", "pipe"],
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stderr is not None
    assert process.stderr.readline() == b"waiting\n"
    process.kill()
    process.wait(30)
    process.stderr.close()
    assert list(tmp_path.iterdir()) == [tmp_path / "pipe"]


@pytest.mark.parametrize("path", ["", "none/", "x" * 300])
def test_an_impossible_path_is_reported_first(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: FakeSource
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (("record",), ("bundle", "-o")):
        result = invoke(*command, path)
        assert result.exit_code == 1
        assert f"kvmtrace: {path}: " in result.stderr
    assert not source.polls


# -- what is written reaches the disk, and nobody who reads events waits for that


def test_a_slow_disk_does_not_hold_up_a_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FakeSource(STORY[:2], STORY[2:])
    synced: list[bool] = []

    def slow(descriptor: int) -> None:
        synced.append(source.drained.wait(20))

    monkeypatch.setattr(output_file, "_fsync", slow)
    monkeypatch.setattr(sources, "open_source", lambda kind: source)
    path = tmp_path / "r"
    assert invoke("record", str(path), "--duration", "0.5").exit_code == 0
    assert synced
    assert all(synced)


def test_a_bundle_is_on_the_disk_before_it_has_its_name(
    recording: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new"
    there: list[tuple[bool, bool]] = []

    def noted(descriptor: int) -> None:
        there.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), path.exists()))

    monkeypatch.setattr(os, "fsync", noted)
    assert invoke("bundle", "-o", str(path), "--from", recording).exit_code == 0
    assert there[0] == (False, False)
    assert there[-1] == (True, True)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_reported_with_its_file(
    recording: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    path = tmp_path / "new"
    for command in outputs(recording, path):
        result = invoke(*command)
        assert result.exit_code == 1
        assert f"kvmtrace: {path}: {os.strerror(number)}\nhint: " in result.stderr
        path.unlink(missing_ok=True)
    assert list(tmp_path.iterdir()) == [Path(recording)]


def test_what_cannot_be_synced_is_written_all_the_same(
    recording: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(descriptor: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", cannot)
    for command in outputs(recording, tmp_path / "new", "--force"):
        assert invoke(*command).exit_code == 0


def test_a_signal_ends_the_wait_for_a_disk(tmp_path: Path) -> None:
    hung = "\n".join(
        (
            "import os, threading",
            "from kvmtrace import cli, sources",
            "from kvmtrace.cli import output_file",
            "from tests.unit.fake import STORY, FakeSource",
            "def hang(descriptor):",
            "    os.write(2, b'syncing\\n')",
            "    threading.Event().wait()",
            "output_file._fsync = hang",
            "sources.open_source = lambda kind: FakeSource(STORY)",
            "cli.main()",
        )
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hung, "record", str(tmp_path / "r")],
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stderr is not None
    output = b""
    while b"syncing\n" not in output:
        output += process.stderr.readline()
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"kvmtrace: {tmp_path / 'r'}: the disk does not answer\n".encode() in err


# -- however long a recording is


def test_a_bundle_holds_no_more_than_a_few_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    many = [replace(STORY[3], ts=STORY[3].ts + n) for n in range(3000)]
    path = tmp_path / "r"
    with path.open("w") as file:
        Writer(file, Host("sick", "6.18.15", "bpf")).write([*STORY, *many], PROBES)
    held: list[int] = []
    poll = RecordingSource.poll

    def polled(source: RecordingSource, timeout: float) -> list[Event]:
        held.append(sum(isinstance(one, Exit) and one in kept for one in gc.get_objects()))
        return poll(source, timeout)

    kept = set(many)
    monkeypatch.setattr(RecordingSource, "poll", polled)
    monkeypatch.setattr(recording_module, "BATCH", 100)
    request.addfinalizer(gc.unfreeze)
    gc.freeze()  # what was there before is not looked at: ``many``, and all modules
    for command in (
        ("explain", "web-1"),
        ("bundle", "-o", str(tmp_path / "a")),
        ("bundle", "--redact", "-o", str(tmp_path / "b")),
    ):
        held.clear()
        assert invoke(*command, "--from", str(path)).exit_code == 0
        assert len(held) >= 30
        assert 0 < max(held) < 500


@pytest.mark.parametrize("redact", [(), ("--redact",)])
def test_a_bundle_of_what_comes_by_a_pipe(
    recording: str, tmp_path: Path, redact: tuple[str, ...]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(Path(recording).read_bytes()))
    writer.start()
    result = invoke("bundle", "-o", str(tmp_path / "new"), "--from", str(pipe), *redact)
    writer.join()
    assert (result.exit_code, result.stderr.count("kvmtrace:")) == (0, 0)
    events = bundled(tmp_path / "new")
    assert ("web-1" in events) == (not redact)
    assert len(events.splitlines()) > 5
    assert events.splitlines()[-1].startswith('{"kind":"probes","end":true')


def bundled(path: Path) -> str:
    with tarfile.open(path) as archive:
        file = archive.extractfile("kvmtrace-bundle/events.jsonl")
        assert file is not None
        return file.read().decode()


def test_names_that_are_recorded_while_a_bundle_is_made_are_not_in_it(
    recording: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewind = RecordingSource.rewind

    def late(source: RecordingSource) -> None:
        with open(recording, "a") as file:
            file.write('{"kind":"sigbus","ts":5,"pid":1,"tid":1,"code":4,"comm":"acme"}\n')
            file.write('{"kind":"vm_seen","ts":5,"vm":9,"pid":1,"name":"acme"}\n')
        rewind(source)

    monkeypatch.setattr(RecordingSource, "rewind", late)
    out = tmp_path / "new"
    assert invoke("bundle", "-o", str(out), "--redact", "--from", recording).exit_code == 0
    assert '"vm":9' not in bundled(out)


def test_a_bundle_of_a_recording_without_its_end_has_none(recording: str, tmp_path: Path) -> None:
    path = Path(recording)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    out = tmp_path / "new"
    result = invoke("bundle", "-o", str(out), "--from", recording)
    assert (result.exit_code, "the end is missing" in result.stderr) == (1, True)
    path.write_text(bundled(out))
    result = invoke("replay", recording)
    assert (result.exit_code, "the end is missing" in result.stderr) == (1, True)


def test_a_signal_while_a_recording_is_read_leaves_no_bundle_of_a_part(
    recording: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poll = RecordingSource.poll

    def interrupted(source: RecordingSource, timeout: float) -> list[Event]:
        signals.stop.requested = True
        return poll(source, timeout)

    monkeypatch.setattr(recording_module, "BATCH", 2)
    monkeypatch.setattr(RecordingSource, "poll", interrupted)
    result = invoke("bundle", "-o", str(tmp_path / "new"), "--from", recording)
    assert (result.exit_code, result.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == [Path(recording)]


def test_a_full_directory_for_temporary_files_is_named(
    recording: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = functools.partial(open, "/dev/full", "w+b", buffering=0)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    result = invoke("bundle", "-o", str(tmp_path / "new"), "--from", recording)
    assert result.exit_code == 1
    where = tempfile.gettempdir()
    assert f"kvmtrace: {where}: No space left on device\nhint: TMPDIR" in result.stderr
    assert list(tmp_path.iterdir()) == [Path(recording)]
