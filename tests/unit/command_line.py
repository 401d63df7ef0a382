"""The command line in this process, with stdout and stderr apart."""

from __future__ import annotations

import inspect
from typing import Any

from click.testing import CliRunner, Result

from kvmtrace import cli

# Before 8.2, click's runner puts stderr into stdout by default, and has no other `output`.
_APART: dict[str, Any] = (
    {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
)


def invoke(*arguments: str) -> Result:
    """Run ``kvmtrace ARGUMENTS``; look at ``stdout`` and ``stderr`` of the result."""
    return CliRunner(**_APART).invoke(cli.cli, arguments, prog_name="kvmtrace")
