"""Read the dashboards' JSON, so that tests can run the query of every panel."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.prometheus import JOB

_LABEL_VALUES = re.compile(r"label_values\((?P<series>.+), (?P<label>\w+)\)")

DASHBOARDS = Path(__file__).resolve().parent.parent / "dashboards"
ALERTS = DASHBOARDS / "alerts.yml"
HOST = DASHBOARDS / "kvmtrace-host.json"


@dataclass(frozen=True, slots=True)
class Query:
    """A query of a panel, with Grafana's variables unreplaced."""

    panel: str
    ref: str
    expr: str

    def filled(self, instance: str, window: str = "2m", *, job: str = JOB, vm: str = ".*") -> str:
        """The expression for one host, with ``window`` for all of Grafana's intervals.

        ``vm``: a regular expression, as Grafana makes it of the chosen VMs.
        """
        values = {
            "$__rate_interval": window,
            "$__range": window,
            "$instance": instance,
            "$job": job,
            "$vm": vm,
        }
        expr = self.expr
        for name, value in values.items():
            expr = expr.replace(name, value)
        assert "$" not in expr, expr
        return expr


def load(path: Path = HOST) -> dict[str, Any]:
    """Load a dashboard."""
    board: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return board


def quick_alerts() -> str:
    """The alert rules with a second for each ``for`` and ``keep_firing_for``."""
    text = ALERTS.read_text(encoding="utf-8")
    return re.sub(r"^( +(?:keep_firing_)?for): \w+$", r"\1: 1s", text, flags=re.MULTILINE)


def queries(board: dict[str, Any]) -> Iterator[Query]:
    """Yield every query: of panels, of annotations, and the series that variables are made of."""
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            found = _LABEL_VALUES.fullmatch(variable["query"])
            assert found, variable
            expr = f"count by ({found['label']}) ({found['series']})"
            yield Query(f"variable {variable['name']}", "A", expr)
    for annotation in board["annotations"]["list"]:
        yield Query(f"annotation {annotation['name']}", "A", annotation["expr"])
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield Query(panel["title"], target["refId"], target["expr"])
