"""A recording of each scenario, anew: ``python -m tests.lab.recordings`` (make recordings).

Each is recorded beside the scenario's own kvmtrace, on one kernel, and kept as
``tests/recordings/scenarios/lab-NAME.jsonl``, the output of commands that read it beside it. Before
``recording.FORMAT`` is raised, rename those of the old format (``lab1-NAME``): they stay.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import gzip
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.lab.errors import status_of
from tests.lab.harness import PATIENCE, Unstageable, recorded
from tests.lab.machine import DEFAULT, Machine
from tests.lab.matrix import SMALLER
from tests.lab.progress import print_status
from tests.lab.scenarios import SCENARIOS, Scenario
from tests.unit import test_reference_recordings as reference

SOURCE = "bpf"
_LOG = "/tmp/kept.jsonl"

# Each signal is an event of its own: few are as good as many.
_SMALLER = SMALLER | {"deaf_crowd": {"rounds": 80}, "looping_in_top": {"gap_us": 50_000}}


def target(name: str) -> Path:
    """Where the recording of a scenario is, of the format that is written now."""
    return reference.DIRECTORY / f"lab-{name}.jsonl"


def main() -> int:
    """Record the scenarios, then write what commands show of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.recordings", description=__doc__)
    parser.add_argument("--kernel", default=DEFAULT, help="on this kernel")
    parser.add_argument("--scenario", action="append", help="only this one (may be repeated)")
    options = parser.parse_args()
    failed = _record_all(options.kernel, options.scenario)
    reference.main()
    return int(failed)


def _record_all(kernel: str, only: Sequence[str] | None) -> bool:
    failed = False
    chosen = [one for one in SCENARIOS if only is None or one.name in only]
    for scenario in chosen:
        if SOURCE not in scenario.sources:
            continue
        with Machine.boot(kernel, **scenario.boot) as machine:
            try:
                _record(machine, scenario)
            except Unstageable as reason:
                print_status(f"{scenario.name}: not staged: {reason}")
            except Exception as error:
                failed = True
                print_status(f"{scenario.name}: {type(error).__name__}: {error}")
    return failed


def _record(machine: Machine, scenario: Scenario) -> None:
    def recorder() -> contextlib.AbstractContextManager[str]:
        return recorded(machine, SOURCE, _LOG)

    smaller = _SMALLER.get(scenario.name, {})
    if scenario.is_late:
        scenario.run(machine, SOURCE, beside=recorder, **smaller)
    else:
        with recorder():
            scenario.run(machine, SOURCE, **smaller)
    packed = machine.run(f"gzip -c {_LOG} | base64", timeout=PATIENCE, check=True)
    target(scenario.name).write_bytes(gzip.decompress(base64.b64decode(packed.stdout)))
    print_status(f"{scenario.name}: recorded")


if __name__ == "__main__":
    sys.exit(status_of(main))
