"""Run programs of the host; failures become LabErrors of one line."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.lab.errors import LabError


def output(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Return what `command` prints; LabError if it is missing or its status is not 0."""
    name = Path(command[0]).name
    environment = os.environ | {"LC_ALL": "C"} | dict(env or {})
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=environment, cwd=cwd
        )
    except FileNotFoundError:
        raise LabError(f"{name} is not installed: run `sh tests/lab/setup.sh`") from None
    if done.returncode:
        printed = (done.stderr.strip() or done.stdout.strip()).splitlines()
        errors = [line for line in printed if line.startswith(("E:", "ERROR:", "W: GPG"))]
        raise LabError(f"{name} failed: {' '.join(errors or printed)[-600:]}")
    return done.stdout
