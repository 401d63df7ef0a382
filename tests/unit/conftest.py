"""For unit tests: no test meets the serve of another one, of another run, or of this host."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmtrace import feed_socket
from kvmtrace.sources.bpf import program_cache


@pytest.fixture(autouse=True)
def own_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Where a serve that this test starts, also in a process of its own, has its socket."""
    path = tmp_path_factory.mktemp("run")
    monkeypatch.setenv(feed_socket.VARIABLE, str(path))
    monkeypatch.setenv(program_cache.VARIABLE, "")  # nothing is kept on this host
    return path
