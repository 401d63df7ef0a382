"""Run the command line in this process, with separate stdout and stderr."""

from __future__ import annotations

import inspect
from typing import Any

from click.testing import CliRunner, Result

from kvmtrace import cli

# Before 8.2, click's runner puts stderr into stdout by default.
_APART: dict[str, Any] = (
    {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
)


def invoke(*arguments: str) -> Result:
    """Run ``kvmtrace ARGUMENTS``; the result has ``stdout`` and ``stderr``."""
    return CliRunner(**_APART).invoke(cli.cli, arguments, prog_name="kvmtrace")
