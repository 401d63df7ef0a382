"""However VMs start, end and count: a series belongs to one VM, and no counter goes down."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.events import Owner
from kvmtrace.model import Incident, IncidentStatus, Vm
from kvmtrace.views.web.vm_incidents import by_label
from kvmtrace.views.web.vm_labels import OTHER, VmLabels

LATENT = IncidentStatus.LATENT
POISON = ("EHWPOISON", "hwpoison")

# One step: (VM key, what happens to it), several between two scrapes.
_STEPS = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from(["come", "count", "name", "die", "be forgotten", "start again"]),
        ),
        max_size=6,
    ),
    max_size=20,
)


def _vm(key: int, name: str | None, pid: int) -> Vm:
    return Vm(key, pid, name, None, None, {}, {}, 0, None, gone=False)


@given(
    steps=_STEPS,
    names=st.lists(st.sampled_from([None, "a", "a-1", "other"]), min_size=4, max_size=4),
    pids=st.lists(st.integers(1, 2), min_size=4, max_size=4),
    max_vms=st.integers(0, 4),
)
def test_series_mean_one_vm_and_never_go_down(
    steps: list[list[tuple[int, str]]], names: list[str | None], pids: list[int], max_vms: int
) -> None:
    labels = VmLabels(max_vms)
    vms: dict[int, Vm] = {}
    serial = 0
    alive: dict[int, int] = {}  # slot: key; keys are never used twice
    before: dict[str, tuple[int | None, int]] = {}
    highest: dict[str, int] = {}
    for step in steps:
        for slot, what in step:
            if what == "come" and slot not in alive:
                serial += 1
                alive[slot] = serial
                vms[serial] = _vm(serial, None, pids[slot])
            elif what == "start again" and slot in alive:
                del vms[alive[slot]]
                serial += 1
                alive[slot] = serial
                vms[serial] = _vm(serial, names[slot], pids[slot])
            elif slot in alive:
                vm = vms[alive[slot]]
                name, gone, count = vm.name, vm.gone, vm.exits.get(POISON, 0)
                if what == "be forgotten":
                    del vms[alive.pop(slot)]
                    continue
                name = names[slot] if what == "name" else name
                count += what == "count"
                gone |= what == "die"
                vms[vm.key] = Vm(
                    vm.key, vm.pid, name, None, None, {POISON: count}, {}, 0, None, gone
                )
        series, folded = labels.series(dict(vms))

        assert len({one.label for one in series}) == len(series)
        own = [one for one in series if one.vm is not None]
        assert len(own) <= max_vms
        assert len(own) + folded == len(vms)
        now = {one.label: (one.vm.key if one.vm else None, one.exits[POISON]) for one in series}
        for label, (key, count) in now.items():
            was = before.get(label)
            if was is not None and was[0] == key:
                assert count >= was[1], label
        for label, (_, count) in now.items():
            # The VM that went by it before.
            assert count >= highest.get(label, 0), label
            highest[label] = count
        for label, (key, count) in before.items():
            # A VM that counted something keeps its label; "other" is for ever.
            if label == OTHER or (count and key in vms):
                assert now[label][0] == key
        before = now

        # Each VM's incident is counted once, under its own label or under "other".
        pages = [Incident("1-1", LATENT, key, None, None, None, (Owner(key, 1),)) for key in vms]
        states = {label: counts for label, counts, _ in by_label(series, vms, pages)}
        assert {label: counts["latent"] for label, counts in states.items()} == {
            one.label: folded if one.vm is None else 1 for one in series
        }
