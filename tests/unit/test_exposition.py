"""The text of /metrics is the client library's, and a scrape costs what is in it."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from kvmtrace.model import Snapshot, Vm
from kvmtrace.views.web import exposition, vm_labels
from kvmtrace.views.web.exposition import render
from kvmtrace.views.web.metrics import Exporter
from kvmtrace.views.web.vm_labels import VmLabels
from tests.exporter_scenario import Scenario


class Same(Collector):
    """The families of one scrape, for the library."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def vm(key: int, name: str | None = None, **exits: int) -> Vm:
    counts: dict[tuple[str, str | None], int] = {
        (errno, "hwpoison"): n for errno, n in exits.items()
    }
    return Vm(key, 1000 + key, name, None, None, counts, {}, 0, None, gone=False)


ODD = Snapshot(
    vms={
        1: vm(1, 'a "b" \\ c\nd', EHWPOISON=12_345_678),
        2: vm(2, "größe\u202e", EFAULT=1),
        3: vm(3, "", E2BIG=1 << 63),
        4: vm(4),
    }
)


@pytest.mark.parametrize("snapshot", [ODD, Scenario().begin().happen().snapshot(), Snapshot()])
def test_the_text_is_the_librarys(snapshot: Snapshot) -> None:
    exporter = Exporter(lambda: snapshot, max_vms=3)
    for _ in range(2):
        assert render(exporter.families()) == generate_latest(Same(exporter.collect()))
        text = render(exporter.families(), as_openmetrics=True)
        theirs = openmetrics.generate_latest(Same(exporter.collect()))  # type: ignore[no-untyped-call]
        assert text == theirs
    assert text.count(b"# EOF") == 1


def test_lines_of_vms_that_are_gone_are_dropped() -> None:
    for number in range(3):
        one = vm(number, f"vm-{number}")
        snapshot = Snapshot(vms={number: one})
        exporter = Exporter(lambda: snapshot)  # noqa: B023 (called at once)
        render(exporter.families())
        assert list(exporter._by_vm._kept) == [f"vm-{number}"]


def test_a_value_that_changes_is_written_again() -> None:
    snapshots = [Snapshot(vms={1: vm(1, "one", EFAULT=count), 2: vm(2, "two")}) for count in (1, 2)]
    exporter = Exporter(lambda: snapshots[-1])
    first = render(exporter.families())
    snapshots.append(Snapshot(vms={1: vm(1, "one", EFAULT=7, E2BIG=1), 2: vm(2, "two")}))
    second = render(exporter.families())
    assert second == render(Exporter(lambda: snapshots[-1]).families())
    assert set(second.splitlines()) - set(first.splitlines()) == {
        b'kvmtrace_memory_fault_exits_total{cause="hwpoison",errno="EFAULT",vm="one"} 7.0',
        b'kvmtrace_memory_fault_exits_total{cause="hwpoison",errno="E2BIG",vm="one"} 1.0',
    }


def test_a_head_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def escaped(value: str) -> str:
        written.append(value)
        return value

    monkeypatch.setattr(exposition, "_escaped", escaped)
    exporter = Exporter(lambda: ODD)
    render(exporter.families())
    assert written
    written.clear()
    render(exporter.families())
    assert written == []


@pytest.mark.parametrize("vms", [100, 400])
def test_labels_cost_the_number_of_vms(monkeypatch: pytest.MonkeyPatch, vms: int) -> None:
    """Not its square: neither for the first scrape, nor for later ones."""
    cleaned = 0
    real = vm_labels.clean

    def clean(value: str | None) -> str:
        nonlocal cleaned
        cleaned += 1
        return real(value)

    monkeypatch.setattr(vm_labels, "clean", clean)
    labels = VmLabels(vms)
    known = {key: vm(key, f"vm {key}") for key in range(vms)}
    assert len(labels.series(known)[0]) == vms
    assert cleaned <= 3 * vms
    cleaned = 0
    labels.series(known)
    assert cleaned == 0
    assert labels._taken == {f"vm {key}" for key in known} | {"other"}
    labels.series({})
    assert labels._taken == {"other"}
