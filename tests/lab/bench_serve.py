"""A `kvmtrace serve` on a made-up source, and its CPU time (bench_idle.py, bench_scrapes.py)."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def serving(script: str, *arguments: str) -> Iterator[tuple[int, int]]:
    """Run `serve` by ``script``, which replaces the source and takes ``arguments``: (pid, port)."""
    serve = ("serve", "--listen", "127.0.0.1:0")
    with tempfile.TemporaryDirectory() as own:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments, *serve],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "KVMTRACE_RUNTIME_DIR": own},
        )
        try:
            assert process.stderr is not None
            found = re.search(r":(\d+)/metrics", process.stderr.readline())
            assert found
            yield process.pid, int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=20)


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name: state, parent, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_seconds(pid: int) -> float:
    """CPU time that all threads of a process have used."""
    fields = stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
