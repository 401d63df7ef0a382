"""The building blocks of the dashboards: panels and queries as all of ours have them.

The SDK is pinned in pyproject.toml: its version is the dashboard schema's.
"""

from __future__ import annotations

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as prometheus_models

DATASOURCE = models.DataSourceRef("prometheus", "${datasource}")
HOST = 'instance="$instance"'

GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"

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
) -> stat.Panel:
    """One number, coloured by ``thresholds`` [(from, colour)]."""
    return (
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


def series_panel(
    title: str,
    description: str,
    expr: str,
    legend: str,
    *,
    unit: str = "short",
    bars: bool = False,
) -> timeseries.Panel:
    """Lines over time, or ``bars`` for what happens rarely."""
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


def _thresholds(steps: Thresholds) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value, color) for value, color in steps])
    )
