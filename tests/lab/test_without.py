"""A host without bcc and Textual: commands use ftrace and report the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.lab import demo, without
from tests.lab.conftest import prepared
from tests.lab.harness import (
    PATIENCE,
    end_following,
    kvmtrace,
    metrics_of,
    start_serve,
    watching,
)
from tests.lab.hosts import doctor, reports_sigbus_and_exit
from tests.lab.machine import DEFAULT, Machine
from tests.lab.scenarios import SCENARIOS, Scenario

pytestmark = pytest.mark.lab

WHY = "bpf does not work here: bcc is not installed"
HERE = [x for x in SCENARIOS if not x.boot and "ftrace" in x.sources]


@pytest.fixture(scope="module")
def bare(pytestconfig: pytest.Config) -> Iterator[Machine]:
    prepared(pytestconfig, DEFAULT)
    with Machine.boot(DEFAULT, lacking=("bcc", "textual")) as machine:
        yield machine


@pytest.mark.parametrize("scenario", HERE, ids=lambda s: s.name)
def test_scenario(bare: Machine, scenario: Scenario) -> None:
    scenario.run(bare, "ftrace")
    if scenario is HERE[-1]:
        end_following(bare)


def test_auto_takes_ftrace_and_says_why(bare: Machine) -> None:
    shown = kvmtrace(bare, "top --once --json")
    host = json.loads(shown.stdout)["host"]
    assert host["source"] == "ftrace"
    assert host["source_why"].startswith(WHY)
    assert f"source ftrace ({WHY}" in kvmtrace(bare, "top --once").stdout

    report = doctor(bare, "auto")
    assert report["ok"] is True
    (chosen,) = [x["found"] for x in report["checks"] if x["name"] == "--source auto"]
    assert chosen.startswith(f"ftrace ({WHY}")

    serve = start_serve(bare)
    metrics = metrics_of(bare, serve)
    assert re.search(rf'^kvmtrace_source_info{{source="ftrace",why="{WHY}.*"}} 1', metrics, re.M)
    serve.signal(2)
    assert serve.wait(PATIENCE) == 0


def test_the_demo(bare: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.print_final_table(bare, "ftrace") == 0
    shown = capfd.readouterr().out
    assert "source ftrace (asked for)" in shown
    assert re.search(r"^looping +web-1 ", shown, re.MULTILINE), shown


def test_what_needs_no_library_at_all(bare: Machine) -> None:
    """events and top --once need only click. Last test: it removes what serve needs."""
    for line in without.commands(("prometheus_client", "rich")):
        bare.run(line, check=True)
    with watching(bare, "ftrace") as watch:
        reports_sigbus_and_exit(bare, watch)
    assert "source ftrace" in kvmtrace(bare, "top --once --source ftrace").stdout
    refusal = kvmtrace(bare, "serve --source ftrace")
    assert refusal.status == 1
    assert "prometheus" in refusal.stderr
    assert "Traceback" not in refusal.stderr
