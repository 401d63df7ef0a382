"""Generates the Grafana dashboards next to this file: ``python -m dashboards.generate``.

The same code gives the same bytes, so that a test can check whether the JSON was regenerated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

from dashboards.panels import (
    BLUE,
    DATASOURCE,
    GREEN,
    HOST,
    ORANGE,
    RED,
    Thresholds,
    instant_query,
    range_query,
    series_panel,
    stat_panel,
)

HOST_DASHBOARD = Path(__file__).with_name("kvmtrace-host.json")

# Nothing is normal, anything is not.
ANY_IS_BAD: Thresholds = [(None, GREEN), (1, RED)]
NEUTRAL: Thresholds = [(None, BLUE)]


def main() -> None:
    """Write the dashboards."""
    HOST_DASHBOARD.write_text(render(host_dashboard()), encoding="utf-8")


def render(builder: dashboard.Dashboard) -> str:
    """The dashboard as JSON, ending in a newline."""
    return json.dumps(builder.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def host_dashboard() -> dashboard.Dashboard:
    """One host: what is poisoned, which VMM was notified, whether it copes, what is not seen."""
    board = (
        dashboard.Dashboard("kvmtrace: host")
        .uid("kvmtrace-host")
        .description("Memory faults and poisoned memory of the VMs of one host, by kvmtrace.")
        .tags(["kvmtrace", "kvm"])
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time("now-6h", "now")
        .refresh("1m")
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(
            dashboard.QueryVariable("instance")
            .label("Host")
            .datasource(DATASOURCE)
            .query("label_values(kvmtrace_build_info, instance)")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
        )
    )
    for panel in (*_now(), *_vms(), *_over_time(), *_kvmtrace_itself()):
        board = board.with_panel(panel)
    return board


def _now() -> list[stat.Panel]:
    return [
        stat_panel(
            "VMMs looping",
            "Incidents in which a VM is notified of the same page again and again: its VMM does "
            "not cope. Stop the VM now and start it again; do not migrate it.",
            f'sum(kvmtrace_incidents{{{HOST}, state="looping"}})',
            ANY_IS_BAD,
        ),
        stat_panel(
            "Poisoned pages of the kernel",
            "Poisoned pages that the kernel uses itself, or could not get hold of. It can run into "
            "them at any time: move the VMs away and reboot the host.",
            f"sum(kvmtrace_kernel_poisoned_pages{{{HOST}}})",
            ANY_IS_BAD,
        ),
        stat_panel(
            "Poisoned pages in VMs",
            "Poisoned pages that VMs hold now. Shut those VMs down from inside the guest and start "
            "them again; do not migrate, save, snapshot or dump them before that.",
            f"sum(kvmtrace_vm_poisoned_pages{{{HOST}}})",
            [(None, GREEN), (1, ORANGE)],
        ),
        stat_panel(
            "Hardware corrupted",
            "Memory the kernel has taken out of use (HardwareCorrupted in /proc/meminfo).",
            f"max(kvmtrace_hardware_corrupted_bytes{{{HOST}}})",
            [(None, GREEN), (1, ORANGE)],
            unit="bytes",
            span=3,
        ),
        stat_panel(
            "Poison to delivery, median",
            "How long half of the pages poisoned in the time shown took until their VMM was "
            "notified for the first time. If no guest touches a page, its VMM is notified late or "
            "never: normal.",
            f"histogram_quantile(0.5, {_latency_buckets()})",
            NEUTRAL,
            unit="s",
            no_value="no delivery",
            span=3,
        ),
        stat_panel(
            "Poison to delivery, 95 %",
            "The same for 95 of 100 pages.",
            f"histogram_quantile(0.95, {_latency_buckets()})",
            NEUTRAL,
            unit="s",
            no_value="no delivery",
            span=3,
        ),
        stat_panel(
            "Probes not attached",
            "Probes without which something stays unseen; see the panel below for which.",
            f"count(kvmtrace_probe_attached{{{HOST}}} == 0) or vector(0)",
            [(None, GREEN), (1, ORANGE)],
            span=3,
        ),
    ]


def _latency_buckets() -> str:
    return f"sum by (le) (increase(kvmtrace_poison_to_delivery_seconds_bucket{{{HOST}}}[$__range]))"


def _vms() -> list[table.Panel]:
    columns = {
        "vm": "VM",
        "Value #pages": "Poisoned pages",
        "Value #poison": "Exits EHWPOISON",
        "Value #conversion": "Conversions",
        "Value #failed": "Failed faults",
        "Value #sigbus": "SIGBUS",
        "pid": "PID",
        "vmm": "VMM",
        "uuid": "UUID",
    }
    exits = f"sum by (vm) (kvmtrace_memory_fault_exits_total{{{HOST}, cause"
    info = f"max by (vm, pid, vmm, uuid) (kvmtrace_vm_info{{{HOST}}})"
    panel = (
        table.Panel()
        .title("VMs")
        .description(
            "Every VM known on the host with its counts since kvmtrace started, the troubled ones "
            'first. The row "other" stands for the VMs beyond kvmtrace\'s limit. Failed faults: '
            "the backing was gone or unmapped, or the cause is not known."
        )
        .unit("short")
        .span(24)
        .height(9)
        .datasource(DATASOURCE)
        .with_target(instant_query("pages", f"sum by (vm) (kvmtrace_vm_poisoned_pages{{{HOST}}})"))
        .with_target(instant_query("poison", f'{exits}="hwpoison"}})'))
        .with_target(instant_query("conversion", f'{exits}="conversion"}})'))
        .with_target(instant_query("failed", f'{exits}!~"hwpoison|conversion|userfault"}})'))
        .with_target(instant_query("sigbus", f"sum by (vm) (kvmtrace_sigbus_total{{{HOST}}})"))
        .with_target(instant_query("info", info))
        .with_transformation(
            models.DataTransformerConfig("joinByField", options={"byField": "vm", "mode": "outer"})
        )
        .with_transformation(
            models.DataTransformerConfig(
                "filterFieldsByName", options={"include": {"names": list(columns)}}
            )
        )
        .with_transformation(
            models.DataTransformerConfig(
                "organize",
                options={
                    "indexByName": {name: at for at, name in enumerate(columns)},
                    "renameByName": columns,
                },
            )
        )
        .sort_by([common.TableSortByFieldState().display_name("Poisoned pages").desc(True)])
    )
    for name in ("PID", "UUID"):
        panel = panel.override_by_name(name, [models.DynamicConfigValue("unit", "string")])
    return [panel]


def _over_time() -> list[timeseries.Panel]:
    return [
        series_panel(
            "Memory-fault exits by errno and cause",
            "KVM_RUN calls that came back to a VMM with a memory fault, per second. conversion "
            "(confidential VMs) and userfault (demand paging) are normal business; hwpoison, "
            "backing and unannotated are not.",
            f"sum by (errno, cause) (rate(kvmtrace_memory_fault_exits_total{{{HOST}}}"
            "[$__rate_interval]))",
            "{{errno}} {{cause}}",
            unit="cps",
        ),
        series_panel(
            "Memory-fault exits by VM",
            "The ten VMs with the most memory-fault exits per second, of whatever cause.",
            f"topk(10, sum by (vm) (rate(kvmtrace_memory_fault_exits_total{{{HOST}}}"
            "[$__rate_interval])))",
            "{{vm}}",
            unit="cps",
        ),
        series_panel(
            "Incidents by state",
            "Poisoned pages with their owners and deliveries. latent: no guest has touched it yet. "
            "delivered: the VMM was notified. looping: it is notified again and again. unowned: no "
            "VM is known to own the page. "
            "closed: the VM is gone or the page was mended.",
            f"sum by (state) (kvmtrace_incidents{{{HOST}}})",
            "{{state}}",
        ),
        series_panel(
            "Pages poisoned",
            "Pages the kernel declared poisoned, by page type and result as it names them.",
            "sum by (page_type, result) (increase(kvmtrace_poison_events_total"
            f"{{{HOST}}}[$__rate_interval]))",
            "{{page_type}}: {{result}}",
            bars=True,
        ),
        series_panel(
            "SIGBUS to VMMs",
            "Signals for poisoned memory. AR: a vCPU touched it, the VMM must act now. AO: the "
            "VMM is notified early and may act.",
            f"sum by (vm, code) (increase(kvmtrace_sigbus_total{{{HOST}}}[$__rate_interval]))",
            "{{vm}} {{code}}",
            bars=True,
        ),
        series_panel(
            "Poison to delivery",
            "Pages whose VMM was notified for the first time, cumulative by the time that took "
            "since the poisoning.",
            "sum by (le) (increase(kvmtrace_poison_to_delivery_seconds_bucket"
            f"{{{HOST}}}[$__rate_interval]))",
            "within {{le}} s",
            bars=True,
        ),
    ]


def _kvmtrace_itself() -> list[Any]:
    return [
        _probes_panel(),
        series_panel(
            "Lost",
            "What kvmtrace could not record, by place. Anything but 0: counts or incidents above "
            "may be incomplete.",
            f"sum by (where) (increase(kvmtrace_events_lost_total{{{HOST}}}[$__rate_interval]))",
            "{{where}}",
            bars=True,
        ),
        series_panel(
            "Probe overhead",
            "Share of one CPU that the host spends in each probe. Empty unless the kernel counts "
            "(sysctl kernel.bpf_stats_enabled=1).",
            f"sum by (probe) (rate(kvmtrace_probe_run_seconds_total{{{HOST}}}[$__rate_interval]))",
            "{{probe}}",
            unit="percentunit",
        ),
        series_panel(
            "Probe time per run",
            "Mean time of one run of each probe. Empty unless the kernel counts.",
            f"sum by (probe) (rate(kvmtrace_probe_run_seconds_total{{{HOST}}}[$__rate_interval]))"
            " / "
            f"sum by (probe) (rate(kvmtrace_probe_runs_total{{{HOST}}}[$__rate_interval]) > 0)",
            "{{probe}}",
            unit="s",
        ),
        series_panel(
            "kvmtrace's own CPU",
            "Share of one CPU that kvmtrace's own process takes.",
            f"sum(rate(process_cpu_seconds_total{{{HOST}}}[$__rate_interval])"
            f" and on (job, instance) kvmtrace_build_info{{{HOST}}})",
            "kvmtrace",
            unit="percentunit",
        ),
        _source_panel(),
    ]


def _probes_panel() -> statetimeline.Panel:
    attached = f"max by (probe) (kvmtrace_probe_attached{{{HOST}}})"
    return (
        statetimeline.Panel()
        .title("Probes attached")
        .description(
            "Which probes were attached when. kvmtrace doctor says what is missing without one, "
            "and why it is not attached."
        )
        .unit("none")
        .span(12)
        .height(8)
        .datasource(DATASOURCE)
        .with_target(range_query(attached, "{{probe}}"))
        .mappings(
            [
                models.ValueMap(
                    {
                        "0": models.ValueMappingResult("missing", ORANGE, index=0),
                        "1": models.ValueMappingResult("attached", GREEN, index=1),
                    }
                )
            ]
        )
        .show_value(common_models.VisibilityMode.NEVER)
    )


def _source_panel() -> table.Panel:
    source = f"max by (source, why) (kvmtrace_source_info{{{HOST}}})"
    return (
        table.Panel()
        .title("Source")
        .description("Where kvmtrace takes its events from on this host, and why from there.")
        .unit("string")
        .span(12)
        .height(8)
        .datasource(DATASOURCE)
        .with_target(instant_query("source", source))
        .with_transformation(
            models.DataTransformerConfig(
                "organize",
                options={
                    "excludeByName": {"Time": True, "Value": True},
                    "renameByName": {"source": "Source", "why": "Why"},
                },
            )
        )
        .no_value("kvmtrace is not running here, or its source has ended")
    )


if __name__ == "__main__":
    main()
