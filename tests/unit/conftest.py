"""Isolation of unit tests: none finds a serve of another test, another run, or the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmtrace import local_socket
from kvmtrace.cli import configuration
from kvmtrace.sources.bpf import program_cache
from kvmtrace.views.web.server import Server
from tests.exporter_scenario import Scenario
from tests.unit import serving
from tests.unit.command_line import Complete, use
from tests.unit.fake import STORY, FakeSource
from tests.unit.fake_proc import Proc


@pytest.fixture(autouse=True)
def own_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Give the test and processes that it starts their own directory for a serve's socket."""
    path = tmp_path_factory.mktemp("run")
    monkeypatch.setenv(local_socket.VARIABLE, str(path))
    monkeypatch.setenv(program_cache.VARIABLE, "")  # nothing is kept on this host
    monkeypatch.setenv(configuration.VARIABLE, "")  # nor taken from its configuration
    return path


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The HTTP server of a serve to which `Scenario` has happened."""
    running = serving.serve("127.0.0.1:0", Scenario().begin().happen())
    yield running
    running.close()


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    """What commands open: the story in two batches."""
    return use(monkeypatch, Complete(STORY[:2], STORY[2:]))


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    """A /proc without processes."""
    return Proc(tmp_path)
