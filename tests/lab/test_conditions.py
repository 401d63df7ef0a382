"""Hosts that are not as one would like, on the newest kernel, by the source that it matters to.

``make matrix`` has every condition with every source on every kernel; see conditions.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.lab.conditions import (
    CONDITIONS,
    kvm_comes_and_goes,
    lockdown,
    no_kvm_types,
    no_tracefs,
    unprivileged,
)
from tests.lab.conftest import Boot
from tests.lab.drive import end_following
from tests.lab.machine import Machine

pytestmark = pytest.mark.lab

BOOTS = {condition.run: condition.boot for condition in CONDITIONS}


@pytest.mark.parametrize(
    ("run", "source"),
    [
        (no_kvm_types, "bpf"),
        (no_tracefs, "ftrace"),
        (unprivileged, "ftrace"),
        (lockdown, "bpf"),
        (kvm_comes_and_goes, "ftrace"),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_condition(
    run: Callable[..., None], source: str, boot: Boot, request: pytest.FixtureRequest
) -> None:
    options = BOOTS[run]
    machine: Machine = boot(**options) if options else request.getfixturevalue("machine")
    end_following(machine)
    run(machine, source)
