"""The plan and the table of the matrix, without running any scenario."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from tests.lab import matrix
from tests.lab.errors import LabError
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
            "other": ("6.12", {("storm", "bpf"): "pass", ("storm", "ftrace"): "pass"}),
        }
    )
    lines = text.splitlines()
    assert lines[0] == "| scenario | source | old | new | other |"
    assert lines[3:] == [
        "| storm | bpf | FAIL [1] | pass | pass |",
        "| storm | ftrace | not run | not run | pass |",
        "| kaslr | bpf | — [2] | — [2] | not run |",
        "",
        "[1] FAIL: KeyError  ",
        f"[2] {reason}  ",
    ]


def test_sources_of_which_the_same_is_to_be_said_share_a_row() -> None:
    text = matrix.table({"new": ("7.3", {("storm", "ftrace"): "pass", ("storm", "bpf"): "pass"})})
    assert text.splitlines()[3] == "| storm | bpf, ftrace | pass |"


def test_runs_are_collected_and_each_architecture_has_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = []
    for number, results in enumerate(
        (
            {"sid": ("7.2", {("storm", "bpf"): "FAIL: KeyError", ("churn", "bpf"): "pass"})},
            {"arm64-16k": ("7.3", {("storm", "bpf"): "pass"})},
            {"sid": ("7.2", {("storm", "bpf"): "pass"})},
        )
    ):
        matrix.save(results)
        kept.append((tmp_path / "build/matrix.json").rename(tmp_path / str(number)))
    found = matrix.collected(kept)
    assert found["sid"] == ("7.2", {("storm", "bpf"): "pass", ("churn", "bpf"): "pass"})
    first, second = matrix.tables(found).split("\n\n")
    assert first.splitlines()[3] == "| storm | bpf | pass |"
    assert second.splitlines()[0] == "| scenario | source | arm64-16k |"
    matrix.save({"sid": ("7.4", {})})
    with pytest.raises(LabError, match=r"sid was 7\.4"):
        matrix.collected([*kept, tmp_path / "build/matrix.json"])


@pytest.mark.parametrize(("arguments", "saved"), [((), True), (("--kernel", "sid"), False)])
def test_only_a_whole_run_is_saved_for_make_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], saved: bool
) -> None:
    cells = {("storm", "bpf"): "pass"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matrix, "run_kernel", lambda *_: ("7.2", cells))
    monkeypatch.setattr(sys, "argv", ["matrix", *arguments])
    assert matrix.main() == 0
    assert Path("build/matrix.json").exists()
    assert Path("build/matrix.md").exists() is saved
