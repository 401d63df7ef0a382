"""Reference recordings: replay and explain show the same as when these were recorded.

``tests/recordings/scenarios/NAME.jsonl`` is a recording, ``NAME.json`` the output of commands that
read it. After an intended change, ``python -m tests.unit.test_reference_recordings`` rewrites the
output.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmtrace.sources.recording import FORMAT
from tests.lab.scenarios import SCENARIOS
from tests.unit.command_line import invoke

DIRECTORY = Path(__file__).parents[1] / "recordings/scenarios"


def recordings() -> list[Path]:
    """All that there are now: `make recordings` adds some."""
    return sorted(DIRECTORY.glob("*.jsonl"))


# Phrases that were replaced since.
REWORDED = {
    "whose page it is: no VM with it was found": "who owns the page: no VM that has it was found",
    "no VM is known to, and the kernel": "no VM is known to have it, and the kernel",
    "the vCPU was not looked at after it was notified": (
        "the state of the vCPU was not read after it was notified"
    ),
    "who was notified of it, and touched it, before kvmtrace started": (
        "who accessed it, and was notified, before kvmtrace started"
    ),
    "a process was notified of the page, for which of its VMs is not known": (
        "a process with several VMs was notified, and it is not known for which of them"
    ),
    "mapped by VMs, of which it is not the memory": "mapped by VMs that do not own it",
}


def output(*arguments: str) -> str:
    """Run a command that has to succeed; return its stdout."""
    result = invoke(*arguments)
    assert result.exit_code == 0, (arguments, result.stderr, result.exception)
    return result.stdout


def words_of(*explain: str) -> str:
    """The words of a screen of `explain`, without how lines are folded."""
    return " ".join(output(*explain, "--evidence").split())


def shown(recording: Path) -> dict[str, Any]:
    """Everything that commands show of a recording: the model, event lines, each incident."""
    path = str(recording)
    model = json.loads(output("replay", path, "--json"))
    lines = output("replay", path, "--events", "--json").splitlines()
    incidents = {}
    for incident in model["incidents"]:
        explain = ("explain", incident["id"], "--from", path)
        (one,) = json.loads(output(*explain, "--json"))
        incidents[incident["id"]] = {"json": one, "text": words_of(*explain)}
    return {"replay": model, "events": [json.loads(x) for x in lines], "explain": incidents}


def reworded(text: str) -> str:
    for old, new in REWORDED.items():
        text = text.replace(old, new)
    return text


def differences(expected: object, actual: object, at: str = "") -> Iterator[str]:
    """Describe each field that differs, by its path: ``.replay.incidents[0].state: …``."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key in expected | actual:
            if key not in actual:
                yield f"{at}.{key}: missing, was {expected[key]!r}"
            elif key not in expected:
                yield f"{at}.{key}: new, is {actual[key]!r}"
            else:
                yield from differences(expected[key], actual[key], f"{at}.{key}")
    elif isinstance(expected, list) and isinstance(actual, list):
        if len(expected) != len(actual):
            yield f"{at}: {len(actual)} entries, were {len(expected)}"
        for number, (old, new) in enumerate(zip(expected, actual, strict=False)):
            yield from differences(old, new, f"{at}[{number}]")
    else:
        was = reworded(expected) if isinstance(expected, str) else expected
        if was != actual or type(was) is not type(actual):
            yield f"{at}: is {actual!r}, was {expected!r}"


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("recording", recordings(), ids=lambda path: path.stem)
def test_a_recording_is_shown_as_before(recording: Path) -> None:
    expected = json.loads(recording.with_suffix(".json").read_text())
    found = list(differences(expected, shown(recording)))
    listed = "\n".join(found[:40])
    assert not found, f"{recording.stem}: {len(found)} differences\n{listed}"


def test_every_format_is_kept() -> None:
    versions = {
        json.loads(one.open().readline())["kvmtrace_recording"]
        for one in DIRECTORY.glob("lab*.jsonl")
    }
    assert versions == set(range(1, FORMAT + 1))


def test_scenarios_without_a_recording_are_known() -> None:
    recorded = {one.stem.removeprefix("lab-") for one in DIRECTORY.glob("lab-*.jsonl")}
    missing = {one.name for one in SCENARIOS if one.sources != ("both",)} - recorded
    readme = (DIRECTORY.parent / "README.md").read_text()
    listed = re.search(r"Not recorded\s+yet: (.*?)\.", readme, re.DOTALL)
    assert missing == set(re.findall(r"`(\w+)`", listed[1] if listed else ""))


def main() -> None:
    os.environ["TZ"] = "UTC"
    time.tzset()
    for recording in recordings():
        text = json.dumps(shown(recording), ensure_ascii=False, separators=(",", ":"))
        recording.with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
