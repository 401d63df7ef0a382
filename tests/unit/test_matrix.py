"""The plan and the table of the matrix; what is in its cells is found out in the lab."""

from __future__ import annotations

import itertools

from tests.lab import matrix
from tests.lab.scenarios import SOURCES


def test_everything_is_planned_once_and_nothing_is_booted_twice() -> None:
    plan = list(matrix._plan(SOURCES, None))
    wanted = [(scenario, source) for scenario in matrix.EVERYTHING for source in scenario.sources]
    assert len(plan) == len(wanted)
    assert all(cell in plan for cell in wanted)
    boots = [boot for boot, _ in itertools.groupby(scenario.boot for scenario, _ in plan)]
    assert all(boot not in boots[:at] for at, boot in enumerate(boots))


def test_one_source_and_some_scenarios() -> None:
    plan = list(matrix._plan(("ftrace",), ["kaslr", "parity", "storm"]))
    assert [(scenario.name, source) for scenario, source in plan] == [
        ("storm", "ftrace"),
        ("kaslr", "ftrace"),
    ]


def test_no_cell_is_left_unexplained() -> None:
    reason = "can't be staged: too old"
    text = matrix.table(
        {
            "old": ("6.1", {("kaslr", "bpf"): reason, ("storm", "bpf"): "FAIL: KeyError"}),
            "new": ("7.3", {("kaslr", "bpf"): reason, ("storm", "bpf"): "pass"}),
            "other": ("6.12", {("storm", "bpf"): "pass"}),
        }
    )
    lines = text.splitlines()
    assert lines[0] == "| scenario | source | old | new | other |"
    assert lines[3:] == [
        "| storm | bpf | FAIL [1] | pass | pass |",
        "| kaslr | bpf | — [2] | — [2] | not run |",
        "",
        "[1] FAIL: KeyError  ",
        f"[2] {reason}  ",
    ]
