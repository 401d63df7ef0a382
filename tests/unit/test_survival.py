"""What serve's history survives; `make survival` has more rounds, and a table of the losses."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.survival import cases
from tests.survival.cases import HOUR, Outcome


def _can_mount() -> bool:
    if os.geteuid() != 0:
        return False
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("seconds", [0.1, 1.2])
def test_what_was_written_survives_a_kill(seconds: float, tmp_path: Path) -> None:
    outcome = cases.killed(tmp_path, seconds)
    assert outcome.is_whole
    assert "did not end in order" in outcome.said


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("is_torn", [False, True])
def test_what_was_synced_survives_a_power_cut(seed: int, is_torn: bool, tmp_path: Path) -> None:
    outcome = cases.power_cut(tmp_path, random.Random(seed), is_torn=is_torn)
    assert outcome.is_whole


@pytest.mark.skipif(not _can_mount(), reason="needs to mount a file system")
@pytest.mark.parametrize("case", [cases.disk_full, cases.read_only])
def test_a_disk_that_takes_nothing_for_a_while(
    case: Callable[[Path], Outcome], tmp_path: Path
) -> None:
    outcome = case(tmp_path)
    assert (outcome.counted, outcome.missing) == (7, 0)
    assert outcome.is_whole
    assert "cannot be written" in outcome.said


def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    outcome = cases.damaged(tmp_path, random.Random(1))
    assert outcome.kept == 100
    assert "is now" in outcome.said


@pytest.mark.parametrize("step", [HOUR, -HOUR])
def test_a_step_of_the_clock_costs_nothing(step: int, tmp_path: Path) -> None:
    assert cases.stepped(tmp_path, step).missing == 0


def test_readers_see_no_restart(tmp_path: Path) -> None:
    assert cases.restarted_under_readers(tmp_path, 200).is_whole


def test_a_reboot_makes_history(tmp_path: Path) -> None:
    assert cases.rebooted(tmp_path).missing == 0
