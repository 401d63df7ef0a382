"""Dashboards and alerts: up to date, complete, and correct against a real Prometheus."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator

import pytest

from dashboards import generate, panels
from kvmtrace.judgement.urgency import Level, Urgency
from kvmtrace.model import IncidentStatus, VerdictWord
from kvmtrace.views.web import metrics
from tests import dashboards
from tests.exporter_scenario import CONVERSIONS, LOOPS, Scenario
from tests.prometheus import JOB, Prometheus, missing, required
from tests.unit import serving

needs_prometheus = pytest.mark.skipif(
    missing("prometheus", "promtool") is not None and not required(),
    reason=str(missing("prometheus", "promtool")),
)

RUNBOOK = dashboards.DASHBOARDS.parent / "docs/runbook.md"
BOARD = dashboards.load()
QUERIES = list(dashboards.queries(BOARD))
_IDS = [f"{query.panel}-{query.ref}" for query in QUERIES]

HERE = "this host"  # stands for the scraped instance

# What each panel shows after the scenario: {sorted label values: value}, every query by panel and
# ref. None: a rate, of which only the series and that it is above 0 can be foretold.
_V = dict[tuple[str, ...], float | None]
EXPECTED: dict[tuple[str, str], _V] = {
    ("variable job", "A"): {(JOB,): 1},
    ("variable instance", "A"): {(HERE,): 1},
    ("variable vm", "A"): {("web",): 1, ("db",): 1, ("vm-103",): 1},
    ("annotation Page poisoned", "A"): {
        ("dirty LRU page", "Recovered"): None,
        ("guest_memfd page", "Recovered"): None,
        ("reserved kernel page", "Ignored"): None,
    },
    ("VMMs looping", "A"): {(): 1},
    ("VMs stopped", "A"): {(): 0},
    ("Undelivered", "A"): {(): 0},
    ("Host at risk", "A"): {(): 1},
    ("Unclear", "A"): {(): 1},
    ("Poisoned pages in VMs", "A"): {(): 3},
    ("Poisoned pages of the kernel", "A"): {(): 1},
    ("Hardware corrupted", "A"): {(): 8192},
    ("Poison to delivery, median", "A"): {(): 0.001},
    ("Poison to delivery, 95 %", "A"): {(): None},
    ("Probes not attached", "A"): {(): 1},
    ("Not kept in the history", "A"): {("no_room",): 0, ("unwritable",): None},
    ("Size of the history", "A"): {(): 65_536},
    ("VMs", "looping"): {("web",): 1, ("db",): 0, ("vm-103",): 0},
    ("VMs", "stopped"): {("web",): 0, ("db",): 0, ("vm-103",): 0},
    ("VMs", "undelivered"): {("web",): 0, ("db",): 0, ("vm-103",): 0},
    ("VMs", "unclear"): {("web",): 0, ("db",): 1, ("vm-103",): 0},
    ("VMs", "pages"): {("web",): 1, ("db",): 2, ("vm-103",): 0},
    ("VMs", "poison"): {("web",): LOOPS, ("db",): 0, ("vm-103",): 0},
    ("VMs", "conversion"): {("web",): 0, ("db",): 0, ("vm-103",): CONVERSIONS},
    ("VMs", "failed"): {("web",): 0, ("db",): 0, ("vm-103",): 0},
    ("VMs", "sigbus"): {("web",): 0, ("db",): 1, ("vm-103",): 0},
    ("VMs", "info"): {
        ("101", "5b2f6a5e-0000-4000-8000-000000000001", "qemu", "web"): 1,
        ("102", "cloud-hypervisor", "db"): 1,
        ("103", "vm-103"): 1,
    },
    ("Memory-fault exits by errno and cause", "A"): {
        ("EHWPOISON", "hwpoison"): None,
        ("EFAULT", "conversion"): None,
        ("EFAULT", "userfault"): 0,
        ("EFAULT", "backing"): 0,
        ("EFAULT", "unannotated"): 0,
        ("EFAULT", "unknown"): 0,
    },
    ("Memory-fault exits by VM", "A"): {("web",): None, ("db",): 0, ("vm-103",): None},
    ("Incidents by state", "A"): {
        ("looping",): 1,
        ("delivered",): 1,
        ("latent",): 1,
        ("unowned",): 1,
        ("closed",): 0,
    },
    ("Incidents by urgency", "A"): {
        ("looping",): 1,
        ("stopped",): 0,
        ("undelivered",): 0,
        ("kernel",): 1,
        ("unclear",): 1,
        ("latent",): 1,
        ("unowned",): 0,
        ("handled",): 0,
        ("closed",): 0,
    },
    ("Incidents by verdict", "A"): {
        ("looping",): 1,
        ("stopped",): 0,
        ("unknown",): 1,
        ("exited",): 0,
        ("handled",): 0,
    },
    ("Undelivered by VM", "A"): {("web",): 0, ("db",): 0, ("vm-103",): 0},
    ("Pages poisoned", "A"): {
        ("dirty LRU page", "Recovered"): None,
        ("guest_memfd page", "Recovered"): None,
        ("guest_memfd page", "Failed"): 0,
        ("reserved kernel page", "Ignored"): None,
    },
    ("SIGBUS to VMMs", "A"): {
        ("AO", "db"): None,
        ("AR", "db"): 0,
        ("AO", "web"): 0,
        ("AR", "web"): 0,
        ("AO", "vm-103"): 0,
        ("AR", "vm-103"): 0,
        **{("KERNEL", vm): 0 for vm in ("db", "web", "vm-103")},
    },
    ("Poison to delivery", "A"): {
        (le,): None for le in "0.001 0.01 0.1 1.0 10.0 60.0 600.0 3600.0 86400.0 +Inf".split()
    },
    ("Probes attached", "A"): {("run",): 1, ("gmem",): 1, ("mce",): 0},
    ("Lost", "A"): {
        ("ring",): None,
        **{(where,): 0 for where in metrics.ZERO_LOST if where != "ring"},
    },
    ("Probe overhead", "A"): {("run",): None, ("gmem",): None},
    ("Probe time per run", "A"): {("run",): 200e-9, ("gmem",): 500e-9},
    ("kvmtrace's own CPU", "A"): {(): None},
    ("Source", "source"): {("bpf", "bpf works here"): 1},
}
# {family: its labels}, by what is exported of the scenario
LABELS = {
    family.name: set().union(*(sample.labels for sample in family.samples))
    for family in metrics.Exporter(Scenario().begin().happen().snapshot).collect()
}
KINDS = [
    ("guest_memfd page", "Recovered"),
    ("dirty LRU page", "Recovered"),
    ("guest_memfd page", "Failed"),
    ("reserved kernel page", "Ignored"),
]


def test_the_dashboard_is_as_generated() -> None:
    board = generate.render(generate.host_dashboard())
    assert board == dashboards.HOST.read_text(encoding="utf-8"), "run python -m dashboards.generate"


@pytest.mark.parametrize("panel", BOARD["panels"], ids=lambda panel: panel["title"])
def test_every_panel_is_complete(panel: dict[str, object]) -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["title"]
    assert str(panel["description"]).endswith(".")
    assert panel["datasource"] == source
    assert panel["fieldConfig"]["defaults"]["unit"]  # type: ignore[index]
    assert panel["targets"]
    for target in panel["targets"]:  # type: ignore[attr-defined]
        assert target["datasource"] == source
        assert 'job="$job", instance="$instance"' in target["expr"]


def test_titles_are_unique_and_panels_do_not_overlap() -> None:
    panels = BOARD["panels"]
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_job_host_and_vm_are_variables() -> None:
    """Links of alerts name them."""
    variables = {one["name"]: one for one in BOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert list(variables) == ["datasource", "job", "instance", "vm"]
    assert variables["vm"]["includeAll"]
    assert variables["vm"]["allValue"] == ".*"


def test_all_that_is_known_by_vm_depends_on_the_vm() -> None:
    """Host-wide metrics do not have the label; a query with it would show nothing."""
    for query in QUERIES:
        for metric, selector in re.findall(r"(kvmtrace_\w+)\{(.*?)\}", query.expr):
            family = re.sub("_(total|bucket|info)$", "", metric)
            by_vm = "vm" in LABELS[family] and query.panel != "variable vm"
            assert ('vm=~"$vm"' in selector) == by_vm, query


def test_words_have_the_colour_of_their_meaning() -> None:
    """What a word calls for is the same in all panels, and as in the landing page."""
    seen: defaultdict[str, set[str]] = defaultdict(set)
    for panel in BOARD["panels"]:
        for one in panel["fieldConfig"]["overrides"]:
            for value in one["properties"]:
                if value["id"] == "color":
                    word = one["matcher"]["options"]
                    seen[word].add(value["value"]["fixedColor"])
    colours = {
        Level.NOW: panels.NOW,
        Level.SOON: panels.SOON,
        Level.WATCH: panels.WATCH,
        Level.OVER: panels.OVER,
    }
    expected = {str(urgency): {colours[urgency.level]} for urgency in Urgency}
    expected |= {"delivered": {panels.SOON}, "unknown": {panels.SOON}, "exited": {panels.OVER}}
    assert seen == expected
    assert set(seen) == {*Urgency, *IncidentStatus, *VerdictWord}


def test_links_lead_into_the_runbook() -> None:
    found = [link["url"] for panel in BOARD["panels"] for link in panel.get("links", [])]
    assert len(found) >= 6
    headings = re.findall(r"^## (\w+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE)
    pages = {f"{panels.DOCS}/runbook.md#{heading.lower()}" for heading in headings}
    assert set(found) <= pages
    assert [link["url"] for link in BOARD["links"]] == [f"{panels.DOCS}/runbook.md"]


def test_every_query_has_an_expectation() -> None:
    assert {(query.panel, query.ref) for query in QUERIES} == EXPECTED.keys()


@needs_prometheus
@pytest.mark.parametrize(
    "command", [("check", "rules", dashboards.ALERTS.name), ("test", "rules", "alerts_test.yml")]
)
def test_alert_rules(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *command],
        cwd=dashboards.DASHBOARDS,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, str]]:
    """A Prometheus that scraped the scenario, and the scraped instance."""
    rules = tmp_path_factory.mktemp("rules") / "alerts.yml"
    rules.write_text(dashboards.quick_alerts())
    scenario = Scenario().begin()
    server = serving.serve("127.0.0.1:0", scenario, kinds=lambda: KINDS)
    instance = f"127.0.0.1:{server.address[1]}"
    try:
        with Prometheus(instance, rules) as prometheus:
            prometheus.wait_for_scrapes(2)
            exits = 'sum(kvmtrace_memory_fault_exits_total{cause="hwpoison"})'
            assert prometheus.value(exits) == 0  # the series is there before the first event
            assert prometheus.alerts() <= {"KvmtraceProbeMissing"}
            scenario.happen()
            prometheus.wait(lambda: prometheus.value(exits) == LOOPS)
            prometheus.wait_for_scrapes(2)
            yield prometheus, instance
    finally:
        server.close()


@needs_prometheus
@pytest.mark.parametrize("query", QUERIES, ids=_IDS)
def test_every_panel_shows_the_scenario(
    scraped: tuple[Prometheus, str], query: dashboards.Query
) -> None:
    prometheus, instance = scraped
    shown = {
        tuple(sorted(HERE if one == instance else one for one in labels.values())): value
        for labels, value in prometheus.query(query.filled(instance))
    }
    expected = {
        tuple(sorted(labels)): value for labels, value in EXPECTED[query.panel, query.ref].items()
    }
    assert shown.keys() == expected.keys()
    for labels, value in expected.items():
        if value is None:
            assert shown[labels] > 0, labels
        else:
            assert shown[labels] == pytest.approx(value, rel=1e-6), labels


@needs_prometheus
@pytest.mark.parametrize("other", [{"instance": "elsewhere:9750"}, {"job": "another"}])
def test_no_other_host_is_shown(scraped: tuple[Prometheus, str], other: dict[str, str]) -> None:
    prometheus, instance = scraped
    for query in QUERIES:
        expr = query.filled(**({"instance": instance} | other))
        values = [value for _, value in prometheus.query(expr)]
        if query.panel.startswith("variable "):
            assert not values or query.panel == "variable job" or "instance" in other
        else:
            assert values == ([0] if query.panel == "Probes not attached" else []), query


@needs_prometheus
def test_no_other_vm_is_shown(scraped: tuple[Prometheus, str]) -> None:
    prometheus, instance = scraped
    for query in QUERIES:
        if "$vm" in query.expr:
            shown = prometheus.query(query.filled(instance, vm="web|other"))
            assert shown, query
            assert {labels.get("vm", "web") for labels, _ in shown} == {"web"}, query
    (pages,) = [query for query in QUERIES if query.panel == "Poisoned pages in VMs"]
    assert prometheus.value(pages.filled(instance, vm="db")) == 2


@needs_prometheus
def test_the_alerts_fire(scraped: tuple[Prometheus, str]) -> None:
    prometheus, _ = scraped
    expected = {
        "KvmtraceLooping",
        "KvmtraceKernelPage",
        "KvmtraceUnclear",
        "KvmtraceLatent",
        "KvmtraceProbeMissing",
        "KvmtraceEventsLost",
        "KvmtraceFirstPoison",
    }
    prometheus.wait(lambda: prometheus.alerts() == expected)
