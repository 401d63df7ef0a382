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
    NOW,
    OVER,
    SOON,
    VM,
    WATCH,
    EventMarks,
    Thresholds,
    instant_query,
    range_query,
    runbook_link,
    series_panel,
    stat_panel,
)

HOST_DASHBOARD = Path(__file__).with_name("kvmtrace-host.json")

# Nothing is normal, anything is not.
ANY_IS_NOW: Thresholds = [(None, GREEN), (1, NOW)]
ANY_IS_SOON: Thresholds = [(None, GREEN), (1, SOON)]
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
            dashboard.QueryVariable("job")
            .label("Job")
            .datasource(DATASOURCE)
            .query("label_values(kvmtrace_build_info, job)")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
        )
        .with_variable(
            dashboard.QueryVariable("instance")
            .label("Host")
            .datasource(DATASOURCE)
            .query('label_values(kvmtrace_build_info{job="$job"}, instance)')
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
        )
        .with_variable(
            dashboard.QueryVariable("vm")
            .label("VM")
            .datasource(DATASOURCE)
            .query(f"label_values(kvmtrace_vm_poisoned_pages{{{HOST}}}, vm)")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
        .annotation(_poisons())
        .link(runbook_link())
    )
    for panel in (*_now(), *_vms(), *_over_time(), *_kvmtrace_itself()):
        board = board.with_panel(panel)
    return board


def _poisons() -> EventMarks:
    """A mark where pages were poisoned. Two minutes have two scrapes, whatever the interval."""
    return EventMarks(
        "Page poisoned",
        f"sum by (page_type, result) (increase(kvmtrace_poison_events_total{{{HOST}}}[2m])) > 0",
        "{{page_type}}: {{result}}",
        SOON,
    )


def _now() -> list[stat.Panel]:
    return [
        stat_panel(
            "VMMs looping",
            "Incidents in which a VM is notified of the same page again and again: its VMM does "
            "not cope. Stop the VM now and start it again; do not migrate it.",
            f'sum(kvmtrace_vm_incidents{{{VM}, state="looping"}})',
            ANY_IS_NOW,
            no_value="no VM",
            runbook="KvmtraceLooping",
        ),
        stat_panel(
            "VMs stopped",
            "Incidents in which the vCPU that was notified no longer runs. Stop the VM now and "
            "start it again; do not migrate it.",
            f'sum(kvmtrace_vm_verdicts{{{VM}, verdict="stopped"}})',
            ANY_IS_NOW,
            no_value="no VM",
            runbook="KvmtraceStopped",
        ),
        stat_panel(
            "Undelivered",
            "Pages that guest_memfd refused to a guest, and of which no VMM was notified. Shut "
            "those VMs down from inside the guest and start them again; do not migrate them.",
            f'sum(kvmtrace_vm_incidents{{{VM}, state="undelivered"}})',
            ANY_IS_NOW,
            no_value="no VM",
            runbook="KvmtraceUndelivered",
        ),
        stat_panel(
            "Host at risk",
            "Whether the kernel uses a poisoned page itself, or could not get hold of one. It can "
            "run into it at any time: move the VMs away and reboot the host. Do not migrate VMs "
            "that hold poisoned pages themselves: shut them down.",
            f"max(kvmtrace_host_at_risk{{{HOST}}})",
            ANY_IS_NOW,
            runbook="KvmtraceKernelPage",
        ).mappings(
            [
                models.ValueMap(
                    {
                        "0": models.ValueMappingResult("no", GREEN, index=0),
                        "1": models.ValueMappingResult("reboot it", NOW, index=1),
                    }
                )
            ]
        ),
        stat_panel(
            "Unclear",
            "Incidents of which a VMM was notified, and what it did is not known. See whether "
            "those VMs work: if so, shut them down from inside the guest, if not, stop them; then "
            "start them again.",
            f'sum(kvmtrace_vm_verdicts{{{VM}, verdict="unknown"}})',
            ANY_IS_SOON,
            no_value="no VM",
            runbook="KvmtraceUnclear",
        ),
        stat_panel(
            "Poisoned pages in VMs",
            "Poisoned pages that VMs hold now. Shut those VMs down from inside the guest and start "
            "them again; do not migrate, save, snapshot or dump them before that.",
            f"sum(kvmtrace_vm_poisoned_pages{{{VM}}})",
            ANY_IS_SOON,
            no_value="no VM",
            runbook="KvmtraceLatent",
        ),
        stat_panel(
            "Poisoned pages of the kernel",
            "Poisoned pages that the kernel uses itself, or could not get hold of.",
            f"sum(kvmtrace_kernel_poisoned_pages{{{HOST}}})",
            ANY_IS_NOW,
            runbook="KvmtraceKernelPage",
        ),
        stat_panel(
            "Hardware corrupted",
            "Memory the kernel has taken out of use (HardwareCorrupted in /proc/meminfo).",
            f"max(kvmtrace_hardware_corrupted_bytes{{{HOST}}})",
            [(None, GREEN), (1, WATCH)],
            unit="bytes",
            span=5,
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
            span=5,
        ),
        stat_panel(
            "Poison to delivery, 95 %",
            "The same for 95 of 100 pages.",
            f"histogram_quantile(0.95, {_latency_buckets()})",
            NEUTRAL,
            unit="s",
            no_value="no delivery",
            span=5,
        ),
        stat_panel(
            "Probes not attached",
            "Probes without which something stays unseen; see the panel below for which.",
            f"count(kvmtrace_probe_attached{{{HOST}}} == 0) or vector(0)",
            ANY_IS_SOON,
            span=5,
            runbook="KvmtraceProbeMissing",
        ),
    ]


def _latency_buckets() -> str:
    return f"sum by (le) (increase(kvmtrace_poison_to_delivery_seconds_bucket{{{HOST}}}[$__range]))"


def _vms() -> list[table.Panel]:
    columns = {
        "vm": "VM",
        "Value #looping": "Looping",
        "Value #stopped": "Stopped",
        "Value #undelivered": "Undelivered",
        "Value #unclear": "Unclear",
        "Value #pages": "Poisoned pages",
        "Value #poison": "Exits EHWPOISON",
        "Value #conversion": "Conversions",
        "Value #failed": "Failed faults",
        "Value #sigbus": "SIGBUS",
        "pid": "PID",
        "vmm": "VMM",
        "uuid": "UUID",
    }
    exits = f"sum by (vm) (kvmtrace_memory_fault_exits_total{{{VM}, cause"
    states = f"sum by (vm) (kvmtrace_vm_incidents{{{VM}, state"
    verdicts = f"sum by (vm) (kvmtrace_vm_verdicts{{{VM}, verdict"
    info = f"max by (vm, pid, vmm, uuid) (kvmtrace_vm_info{{{VM}}})"
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
        .with_target(instant_query("looping", f'{states}="looping"}})'))
        .with_target(instant_query("stopped", f'{verdicts}="stopped"}})'))
        .with_target(instant_query("undelivered", f'{states}="undelivered"}})'))
        .with_target(instant_query("unclear", f'{verdicts}="unknown"}})'))
        .with_target(instant_query("pages", f"sum by (vm) (kvmtrace_vm_poisoned_pages{{{VM}}})"))
        .with_target(instant_query("poison", f'{exits}="hwpoison"}})'))
        .with_target(instant_query("conversion", f'{exits}="conversion"}})'))
        .with_target(instant_query("failed", f'{exits}!~"hwpoison|conversion|userfault"}})'))
        .with_target(instant_query("sigbus", f"sum by (vm) (kvmtrace_sigbus_total{{{VM}}})"))
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
        .sort_by(
            [
                common.TableSortByFieldState().display_name(name).desc(True)
                for name in ("Looping", "Stopped", "Undelivered", "Unclear", "Poisoned pages")
            ]
        )
    )
    for name, color in (
        ("Looping", NOW),
        ("Stopped", NOW),
        ("Undelivered", NOW),
        ("Unclear", SOON),
        ("Poisoned pages", SOON),
    ):
        panel = panel.override_by_name(name, _coloured(color))
    for name in ("PID", "UUID"):
        panel = panel.override_by_name(name, [models.DynamicConfigValue("unit", "string")])
    return [panel]


def _coloured(color: str) -> list[models.DynamicConfigValue]:
    """The text of cells of 1 and more in ``color``."""
    steps = [models.Threshold(None, "text"), models.Threshold(1, color)]
    thresholds = models.ThresholdsConfig(models.ThresholdsMode.ABSOLUTE, steps)
    return [
        models.DynamicConfigValue("thresholds", thresholds),
        models.DynamicConfigValue("custom.cellOptions", {"type": "color-text"}),
    ]


def _over_time() -> list[timeseries.Panel]:
    return [
        series_panel(
            "Incidents by urgency",
            "How soon somebody has to act, by state and verdict together. looping, stopped, "
            "undelivered and kernel: now. unclear and latent: soon. unowned and handled: at most "
            "watch them. closed: it is over.",
            f"sum by (urgency) (kvmtrace_incident_urgencies{{{HOST}}})",
            "{{urgency}}",
            colors={
                **dict.fromkeys(("looping", "stopped", "undelivered", "kernel"), NOW),
                **dict.fromkeys(("unclear", "latent"), SOON),
                **dict.fromkeys(("unowned", "handled"), WATCH),
                "closed": OVER,
            },
        ),
        series_panel(
            "Incidents by verdict",
            "What the VMMs did that were notified. looping: it returns to the page again and "
            "again. stopped: the vCPU no longer runs. unknown: there is no evidence. handled: the "
            "vCPU runs on without the page. exited: the VM is gone.",
            f"sum by (verdict) (kvmtrace_incident_verdicts{{{HOST}}})",
            "{{verdict}}",
            colors={
                "looping": NOW,
                "stopped": NOW,
                "unknown": SOON,
                "handled": WATCH,
                "exited": OVER,
            },
        ),
        series_panel(
            "Incidents by state",
            "Poisoned pages with their owners and deliveries. latent: no guest has touched it yet. "
            "delivered: the VMM was notified. looping: it is notified again and again. unowned: no "
            "VM is known to own the page. "
            "closed: the VM is gone or the page was mended.",
            f"sum by (state) (kvmtrace_incidents{{{HOST}}})",
            "{{state}}",
            colors={
                "looping": NOW,
                "delivered": SOON,
                "latent": SOON,
                "unowned": WATCH,
                "closed": OVER,
            },
        ),
        series_panel(
            "Undelivered by VM",
            "Times that guest_memfd refused a poisoned page to a guest, and KVM_RUN did not notify "
            "the VMM.",
            f"sum by (vm) (increase(kvmtrace_undelivered_total{{{VM}}}[$__rate_interval]))",
            "{{vm}}",
            bars=True,
        ),
        series_panel(
            "Memory-fault exits by errno and cause",
            "KVM_RUN calls that came back to a VMM with a memory fault, per second. conversion "
            "(confidential VMs) and userfault (demand paging) are normal business; hwpoison, "
            "backing and unannotated are not.",
            f"sum by (errno, cause) (rate(kvmtrace_memory_fault_exits_total{{{VM}}}"
            "[$__rate_interval]))",
            "{{errno}} {{cause}}",
            unit="cps",
        ),
        series_panel(
            "Memory-fault exits by VM",
            "The ten VMs with the most memory-fault exits per second, of whatever cause.",
            f"topk(10, sum by (vm) (rate(kvmtrace_memory_fault_exits_total{{{VM}}}"
            "[$__rate_interval])))",
            "{{vm}}",
            unit="cps",
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
            f"sum by (vm, code) (increase(kvmtrace_sigbus_total{{{VM}}}[$__rate_interval]))",
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
        series_panel(
            "Not kept in the history",
            "Events that the history lacks, by why. no_room: too many at once for the memory that "
            "they wait in. unwritable: the disk did not take them. Empty without a history.",
            f"sum by (reason) (increase(kvmtrace_history_events_dropped_total{{{HOST}}}"
            "[$__rate_interval]))",
            "{{reason}}",
            bars=True,
        ),
        series_panel(
            "Size of the history",
            "What kvmtrace keeps on the disk. serve --history-size and --history-days bound it. "
            "Empty without a history.",
            f"max(kvmtrace_history_bytes{{{HOST}}})",
            "history",
            unit="bytes",
        ),
        _source_panel(),
    ]


def _probes_panel() -> statetimeline.Panel:
    attached = f"max by (probe) (kvmtrace_probe_attached{{{HOST}}})"
    return (
        statetimeline.Panel()
        .title("Probes attached")
        .description(
            "Which probes were attached when. kvmtrace doctor shows what is missing without one, "
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
                        "0": models.ValueMappingResult("missing", SOON, index=0),
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
