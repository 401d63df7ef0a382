"""Metrics with series for each VM, of which there are many: see ``exposition``."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from kvmtrace.model import Snapshot
from kvmtrace.views.web.exposition import Labels, ManySeries, Row, Rows
from kvmtrace.views.web.vm_incidents import Counts, by_label
from kvmtrace.views.web.vm_labels import VmSeries, clean

_INFO = ManySeries(
    "kvmtrace_vm",
    "Which VM a vm label stands for.",
    "info",
    ("vm", "name", "uuid", "vmm", "pid"),
)
_EXITS = ManySeries(
    "kvmtrace_memory_fault_exits",
    "KVM_RUN calls that came back to the VMM with a memory fault.",
    "counter",
    ("vm", "errno", "cause"),
)
_SIGBUS = ManySeries(
    "kvmtrace_sigbus",
    "SIGBUS to the VMM for poisoned memory: AR (action required) or AO (action optional).",
    "counter",
    ("vm", "code"),
)
_PAGES = ManySeries(
    "kvmtrace_vm_poisoned_pages", "Poisoned pages that the VM holds now.", "gauge", ("vm",)
)
_UNDELIVERED = ManySeries(
    "kvmtrace_undelivered",
    "Times guest_memfd refused a poisoned page and KVM_RUN did not notify the VMM.",
    "counter",
    ("vm",),
)
_STATES = ManySeries(
    "kvmtrace_vm_incidents",
    "Poisoned pages of the VM that are remembered, by how far the incident is for this VM.",
    "gauge",
    ("vm", "state"),
)
_VERDICTS = ManySeries(
    "kvmtrace_vm_verdicts",
    "Incidents of which the VM's VMM was notified, by what it did; without replaced pages.",
    "gauge",
    ("vm", "verdict"),
)


_FAMILIES = (_INFO, _EXITS, _SIGBUS, _PAGES, _UNDELIVERED, _STATES, _VERDICTS)

Source = Labels | Mapping[tuple[str, str], int] | Counts | int | None
"""What the series of a label in one family depend on."""


def _rows(label: str, source: Source) -> list[Row]:
    if source is None:
        return []
    if isinstance(source, int):
        return [((label,), source)]
    if isinstance(source, tuple):
        return [((label, *source), 1)]
    return [
        ((label, names) if isinstance(names, str) else (label, *names), count)
        for names, count in source.items()
    ]


class _Kept(NamedTuple):
    """A label's lines in each family, and what each of them depends on."""

    sources: tuple[Source, ...]
    texts: tuple[str, ...]


class VmMetrics:
    """Makes the families of one scrape after the other."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def families(self, series: list[VmSeries], snapshot: Snapshot) -> Iterator[Rows]:
        """Yield them. What is as in the last scrape is taken from there."""
        before, self._kept = self._kept, {}
        counts = by_label(series, snapshot.vms, snapshot.incidents)
        for one, (label, states, verdicts) in zip(series, counts, strict=True):
            self._kept[label] = _kept(one, states, verdicts, before.get(label))
        for place, family in enumerate(_FAMILIES):
            texts = [kept.texts[place] for kept in self._kept.values()]
            yield Rows(family, texts, functools.partial(_all_rows, dict(self._kept), place))


def _all_rows(kept: Mapping[str, _Kept], place: int) -> Iterator[Row]:
    for label, one in kept.items():
        yield from _rows(label, one.sources[place])


def _kept(one: VmSeries, states: Counts, verdicts: Counts, known: _Kept | None) -> _Kept:
    label, vm = one.label, one.vm
    who = (clean(vm.name), clean(vm.uuid), clean(vm.vmm), str(vm.pid)) if vm else None
    counts = (one.exits, one.sigbus, one.poisoned_pages, one.undelivered, states, verdicts)
    sources = (who, *counts)
    if known is None:
        texts = [
            family.text(_rows(label, source))
            for family, source in zip(_FAMILIES, sources, strict=True)
        ]
    elif known.sources == sources:
        return known
    else:
        parts = zip(_FAMILIES, sources, known.sources, known.texts, strict=True)
        texts = [
            text
            if source == was
            else family.text(_rows(label, source), text if _are_alike(source, was) else "")
            for family, source, was, text in parts
        ]
    return _Kept(sources, tuple(texts))


def _are_alike(source: Source, was: Source) -> bool:
    """Whether the series have the same labels, in the same order."""
    if isinstance(source, Mapping) and isinstance(was, Mapping):
        return list(source) == list(was)
    return isinstance(source, int) and isinstance(was, int)
