"""Hosts that are not as one would like, on the newest kernel by both sources; see conditions.py."""

from __future__ import annotations

import pytest

from tests.lab.conditions import CONDITIONS, kaslr
from tests.lab.conftest import Boot
from tests.lab.machine import Machine
from tests.lab.scenarios import Scenario

pytestmark = pytest.mark.lab

# Every other test runs on a kernel that moved itself.
TESTED = [condition for condition in CONDITIONS if condition.run is not kaslr]


@pytest.mark.parametrize("condition", TESTED, ids=lambda c: c.name)
def test_condition(condition: Scenario, boot: Boot, request: pytest.FixtureRequest) -> None:
    machine: Machine = (
        boot(**condition.boot) if condition.boot else request.getfixturevalue("machine")
    )
    for source in condition.sources:
        condition.run(machine, source)
