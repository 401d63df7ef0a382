"""The building blocks of the dashboards: panels and queries as all of ours have them.

The SDK is pinned in pyproject.toml: its version is the dashboard schema's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as prometheus_models

DATASOURCE = models.DataSourceRef("prometheus", "${datasource}")
HOST = 'job="$job", instance="$instance"'
VM = f'{HOST}, vm=~"$vm"'

# By what they mean, as in kvmtrace's own views: somebody must act now, soon, should watch it; it is
# over; nothing is wrong. GREEN and BLUE are of figures that call for nothing.
NOW, SOON, WATCH, OVER = "red", "yellow", "#2fb3c6", "#8e8e8e"
GREEN, BLUE = "green", "blue"

# Where docs/ is; the same address as in alerts.yml, which has the command that changes it.
DOCS = "https://docs.example.com/kvmtrace"

Query = prometheus.Dataquery
Thresholds = list[tuple[float | None, str]]


def stat_panel(
    title: str,
    description: str,
    expr: str,
    thresholds: Thresholds,
    *,
    unit: str = "short",
    no_value: str = "no data",
    span: int = 4,
    runbook: str | None = None,
) -> stat.Panel:
    """One number, coloured by ``thresholds`` [(from, colour)]; ``runbook``: a heading in it."""
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .span(span)
        .height(4)
        .datasource(DATASOURCE)
        .with_target(instant_query("A", expr, table_format=False))
        .thresholds(_thresholds(thresholds))
        .color_mode(common_models.BigValueColorMode.VALUE)
        .graph_mode(common_models.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .no_value(no_value)
    )
    return panel if runbook is None else panel.links([runbook_link(runbook)])


def series_panel(
    title: str,
    description: str,
    expr: str,
    legend: str,
    *,
    unit: str = "short",
    bars: bool = False,
    colors: Mapping[str, str] = MappingProxyType({}),
) -> timeseries.Panel:
    """Lines over time, or ``bars`` for what happens rarely; ``colors`` by legend."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .min(0)
        .span(12)
        .height(8)
        .datasource(DATASOURCE)
        .with_target(range_query(expr, legend))
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    )
    for name, color in colors.items():
        fixed = models.FieldColor(models.FieldColorModeId.FIXED, color)
        panel = panel.override_by_name(name, [models.DynamicConfigValue("color", fixed)])
    if bars:
        # Rare events: a bar where something happened reads better than a line along 0.
        return panel.draw_style(common_models.GraphDrawStyle.BARS).fill_opacity(60)
    return panel.fill_opacity(10)


def range_query(expr: str, legend: str) -> Query:
    """A query over the time shown; ``legend`` with {{label}}."""
    return Query().datasource(DATASOURCE).ref_id("A").expr(expr).legend_format(legend).range()


def instant_query(ref: str, expr: str, *, table_format: bool = True) -> Query:
    """A query for now; tables get one frame of labels and value per ``ref``."""
    query = Query().datasource(DATASOURCE).ref_id(ref).expr(expr).instant()
    return query.format(prometheus_models.PromQueryFormat.TABLE) if table_format else query


def runbook_link(heading: str | None = None) -> dashboard.DashboardLink:
    """A link to the runbook, or to one heading of it."""
    anchor = "" if heading is None else f"#{heading.lower()}"
    title = "Runbook" if heading is None else f"Runbook: {heading}"
    return (
        dashboard.DashboardLink(title)
        .type(models.DashboardLinkType.LINK)
        .url(f"{DOCS}/runbook.md{anchor}")
        .icon("doc")
        .target_blank(True)
    )


class EventMarks(dashboard.AnnotationQuery):
    """Marks in all graphs where ``expr`` has values, with ``text`` by {{label}}."""

    def __init__(self, name: str, expr: str, text: str, color: str) -> None:
        super().__init__()
        self._internal = _Marks(
            name=name, datasource=DATASOURCE, icon_color=color, expr=expr, text=text
        )


class _Marks(models.AnnotationQuery):
    """The SDK's class lacks fields that Grafana's Prometheus data source reads."""

    def __init__(self, *, text: str, **fields: Any) -> None:
        super().__init__(**fields)
        self._text = text

    def to_json(self) -> dict[str, object]:
        return super().to_json() | {
            "step": "60s",
            "titleFormat": self.name,
            "textFormat": self._text,
        }


def _thresholds(steps: Thresholds) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value, color) for value, color in steps])
    )
