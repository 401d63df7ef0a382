"""Every scenario on the newest kernel, with each source."""

from __future__ import annotations

import pytest

from tests.lab.machine import Machine
from tests.lab.scenarios import SCENARIOS, Scenario

pytestmark = pytest.mark.lab


@pytest.mark.parametrize("source", ["bpf"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_scenario(machine: Machine, scenario: Scenario, source: str) -> None:
    scenario.run(machine, source)
