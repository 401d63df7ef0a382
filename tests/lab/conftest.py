"""Fixtures for tests that run in a machine, and the environment variable KVMTRACE_LAB.

Unset: these tests run if the lab can start, else they are skipped with the reason. "1": a lab that
cannot start is a failure, so that no green run has skipped it. "0": they are always skipped.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.lab.errors import LabError
from tests.lab.harness import PATIENCE, followed_jobs
from tests.lab.machine import DEFAULT, Machine, prepare

SWITCH = os.environ.get("KVMTRACE_LAB", "")

Boot = Callable[..., Machine]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `lab` if KVMTRACE_LAB=0."""
    if SWITCH == "0":
        for item in items:
            if item.get_closest_marker("lab"):
                item.add_marker(pytest.mark.skip(reason="KVMTRACE_LAB=0"))


@contextmanager
def needed() -> Iterator[None]:
    """Skip the test on LabError, or fail it if the lab must run."""
    try:
        yield
    except LabError as error:
        reason = f"the lab cannot start: {error}"
    else:
        return
    if SWITCH == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def prepared(config: pytest.Config, kernel: str) -> None:
    """Prepare `kernel`; progress is printed, as downloads may take minutes."""
    capture = config.pluginmanager.get_plugin("capturemanager")
    with needed():
        if capture is None:
            prepare(kernel)
        else:
            with capture.global_and_fixture_disabled():
                prepare(kernel)


@pytest.fixture
def boot(pytestconfig: pytest.Config) -> Iterator[Boot]:
    """Boot machines for this test only: `boot("trixie", modules=())`."""
    with ExitStack() as machines:

        def booted(kernel: str = DEFAULT, **options: Any) -> Machine:
            prepared(pytestconfig, kernel)
            return machines.enter_context(Machine.boot(kernel, **options))

        yield booted


class Shared:
    """The machine that the tests of a session share; it is replaced if it has died."""

    def __init__(self) -> None:
        self.machine: Machine | None = None

    def get(self) -> Machine:
        if self.machine is not None and not self.machine.alive:
            self.close()
        if self.machine is None:
            self.machine = Machine.boot(DEFAULT)
        return self.machine

    def close(self) -> None:
        if self.machine is not None:
            self.machine.close()
            self.machine = None


@pytest.fixture(scope="session")
def shared_machine(pytestconfig: pytest.Config) -> Iterator[Shared]:
    """The shared machine for fixtures that outlive a test; tests take `machine`."""
    prepared(pytestconfig, DEFAULT)
    shared = Shared()
    yield shared
    shared.close()


@pytest.fixture
def machine(shared_machine: Shared) -> Iterator[Machine]:
    """The newest kernel, booted once for the session; tests must leave it as they found it.

    Programs that a failed test left running are ended, so that the next test does not see them.
    """
    machine = shared_machine.get()
    before = set(machine.channel.jobs)
    yield machine
    if not machine.alive:
        return
    followed = followed_jobs(machine)
    for identity, job in list(machine.channel.jobs.items()):
        if identity not in before and job not in followed and job.poll() is None:
            job.signal(signal.SIGTERM)
            try:
                job.wait(PATIENCE)
            except LabError:
                job.kill()
