"""Run the command line in this process, with separate stdout and stderr, on a fake source."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvmtrace import cli, sources
from kvmtrace.events import Event
from kvmtrace.vmm import identity
from tests.unit.fake import FakeSource

# Before 8.2, click's runner puts stderr into stdout by default.
_APART: dict[str, Any] = (
    {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
)


def invoke(*arguments: str) -> Result:
    """Run ``kvmtrace ARGUMENTS``; the result has ``stdout`` and ``stderr``."""
    return CliRunner(**_APART).invoke(cli.cli, arguments, prog_name="kvmtrace")


class Complete(FakeSource):
    """A poll that does not wait gives all that is left, as a real source's does: what a command
    sees does not depend on how long it took.
    """

    def poll(self, timeout: float) -> list[Event]:
        events = super().poll(timeout)
        while self._batches and timeout <= 0:
            events += super().poll(timeout)
        return events


def use(monkeypatch: pytest.MonkeyPatch, source: FakeSource) -> FakeSource:
    """Have commands open this source, on a host without processes of VMMs."""
    monkeypatch.setattr(sources, "open_source", lambda kind: source)
    monkeypatch.setattr(identity, "vm_processes", lambda: {})
    return source


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Have opening a source raise this error."""

    def raising(kind: str) -> FakeSource:
        raise error

    monkeypatch.setattr(sources, "open_source", raising)
