"""What a serve holds is bounded, however many VMs begin and end."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

from kvmtrace.correlate.limits import Limits
from kvmtrace.session import archive as archives
from tests.survival.day import POISON_EVERY, day

HOURS = 6
SIZE = 256 << 10


def test_what_is_held_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_SUMMARY_EVERY", 500)
    path = str(tmp_path / "history.db")
    held = list(day(path, HOURS, 10_000, SIZE))
    assert len(held) == HOURS
    live = 10_000 // HOURS // 2 + 1
    assert all(one.vms <= Limits().departed + live + 200 for one in held)
    # Past the size, the file has what it may have, its log, and the summary of all.
    assert all(one.file < 3 * SIZE / (1 << 20) for one in held)
    assert os.path.getsize(path) < 3 * SIZE
    # Poisoned pages stay: four events of each, and its VM's end. A tick each minute is added up
    # when there are thousands.
    more = [after.log - before.log for before, after in pairwise(held[2:])]
    assert max(more) <= 5 * 10_000 // HOURS // POISON_EVERY + 60
