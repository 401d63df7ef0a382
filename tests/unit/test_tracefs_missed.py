"""kprobe_profile: whose misses these are."""

from __future__ import annotations

from pathlib import Path

from kvmtrace.linux.tracefs.missed import Missed


def test_misses_of_our_own_events_are_counted_once(tmp_path: Path) -> None:
    events, profile = tmp_path / "kprobe_events", tmp_path / "kprobe_profile"
    events.write_text("r:other/run f\nr4096:ours/run f vid=vcpu->vcpu_id\np:ours/sigbus g\n")
    missed = Missed(str(tmp_path), "ours")
    row = "  {:44} {:15} {:15}\n".format
    profile.write_text(row("run", 9, 5) + row("run", 9, 2) + row("sigbus", 9, 1))
    assert missed.newly_missed() == 3
    assert missed.newly_missed() == 0
    profile.write_text(row("run", 9, 50) + row("run", 12, 4) + row("sigbus", 9, 1))
    assert missed.newly_missed() == 2
    # An event went between the readings: the next reading shows it.
    profile.write_text(row("run", 12, 6) + row("sigbus", 9, 1))
    assert missed.newly_missed() == 0
    events.write_text("r4096:ours/run f vid=vcpu->vcpu_id\np:ours/sigbus g\n")
    assert missed.newly_missed() == 2


def test_a_kernel_without_kprobe_events(tmp_path: Path) -> None:
    assert Missed(str(tmp_path), "ours").newly_missed() == 0
