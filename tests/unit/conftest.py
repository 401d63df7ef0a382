"""Isolation of unit tests: none finds a serve of another test, another run, or the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmtrace import local_socket
from kvmtrace.sources.bpf import program_cache


@pytest.fixture(autouse=True)
def own_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Give the test and processes that it starts their own directory for a serve's socket."""
    path = tmp_path_factory.mktemp("run")
    monkeypatch.setenv(local_socket.VARIABLE, str(path))
    monkeypatch.setenv(program_cache.VARIABLE, "")  # nothing is kept on this host
    return path
