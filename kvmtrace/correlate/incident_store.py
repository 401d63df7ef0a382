"""All incidents, found by page, by place in a VM or by VM; and which one is forgotten first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from kvmtrace import kvm
from kvmtrace.bounded import BoundedDict
from kvmtrace.correlate.forgotten import Forgotten
from kvmtrace.correlate.incident import (
    RANK_KERNEL,
    RANK_OF_A_VM,
    RANK_OVER,
    GuestPlace,
    IncidentState,
)
from kvmtrace.correlate.limits import CountLost, Limits
from kvmtrace.events import Owner


class _Victim(NamedTuple):
    """An incident to be forgotten, as long as it has this rank and, if it was, is settled."""

    rank: int
    id: str
    was_settled: bool


class IncidentStore:
    """The incidents that are remembered; every index holds only these.

    A caller that finds one may change it, so its copy is thrown away. To go through all of them, or
    through ``mentions_of``, changes none.
    """

    def __init__(
        self, limits: Limits, count_lost: CountLost, page: int = 1 << kvm.PAGE_SHIFT
    ) -> None:
        self._limits = limits
        self._page = page
        self._count_lost = count_lost
        self._all: OrderedDict[str, IncidentState] = OrderedDict()
        self._by_pfn: dict[int, IncidentState] = {}
        self._huge: dict[str, IncidentState] = {}
        self._by_place: dict[GuestPlace, IncidentState] = {}
        self._of_vm: dict[int, dict[str, IncidentState]] = {}
        self._serial: BoundedDict[str, int] = BoundedDict(4 * limits.incidents)
        self._victims: list[_Victim] = []  # the next one last
        self._lowest = RANK_OVER  # no incident but the newest has a lower rank, as far as known
        self.forgotten = Forgotten(4 * limits.incidents)
        self.is_overfull = False
        """Whether ``trim`` has something to do."""

    def __len__(self) -> int:
        return len(self._all)

    def get(self, key: str) -> IncidentState | None:
        """Return the incident with this id, to read."""
        return self._all.get(key)

    def ids(self) -> list[str]:
        """Return all ids, the oldest first."""
        return list(self._all)

    def __iter__(self) -> Iterator[IncidentState]:
        return iter(self._all.values())

    # -- finding

    def find_by_pfn(self, pfn: int) -> IncidentState | None:
        """The open incident in which this page is lost."""
        found = self._by_pfn.get(pfn)
        if found is None and self._huge:
            found = next((one for one in self._huge.values() if one.covers_pfn(pfn)), None)
        if found is not None:
            found.frozen = None
        return found

    def find_by_pfn_range(self, covers: Callable[[int], bool]) -> list[IncidentState]:
        """The open incidents whose pfn is in a range: ``covers`` is true."""
        return _thawed(incident for pfn, incident in self._by_pfn.items() if covers(pfn))

    def find_by_gfn(self, vm: int, gfn: int | None) -> IncidentState | None:
        """The open incident at this place of a live VM, or with a lost huge page that holds it."""
        found = self._by_place.get((vm, gfn))
        if found is None and gfn is not None and self._huge:
            mine = (one for one in self.mentions_of(vm) if one.id in self._huge)
            found = next((one for one in mine if one.owner_by_gfn(vm, gfn)), None)
        if found is not None:
            found.frozen = None
        return found

    def find_place(self, vm: int, gfn: int | None) -> tuple[IncidentState | None, int | None]:
        """As ``find_by_gfn``, and by which gfn the page is known: of a huge one, its owner's."""
        place = (vm, gfn)
        incident = self._by_place.get(place)
        if incident is not None and place in incident.owners:
            incident.frozen = None
            return incident, gfn
        incident = self.find_by_gfn(vm, gfn)
        if incident is None or gfn is None:
            return incident, gfn
        owner = incident.owner_by_gfn(vm, gfn)
        return incident, gfn if owner is None else owner.gfn

    def of_vm(self, vm: int) -> list[IncidentState]:
        """Incidents of which this VM is an owner or was notified, oldest mention first."""
        return _thawed(self.mentions_of(vm))

    def mentions_of(self, vm: int) -> Iterable[IncidentState]:
        """As ``of_vm``, for as long as nothing is changed."""
        return self._of_vm.get(vm, {}).values()

    # -- changing

    def open(self, stem: str) -> IncidentState:
        """Add an incident with an id of the stem and a number; ``trim`` once it has its owners."""
        number = self._serial.get(stem, 0) + 1
        while f"{stem}-{number}" in self._all:  # the number was forgotten, but not the incident
            number += 1
        self._serial[stem] = number
        incident = IncidentState(f"{stem}-{number}", self._limits, self._count_lost, self._page)
        self._all[incident.id] = incident
        self.is_overfull = len(self._all) > self._limits.incidents
        return incident

    def trim(self, is_settled: Callable[[IncidentState], bool]) -> None:
        """Forget incidents for which there is no room, by rank, then those that are settled.

        Of the rest, the oldest of the VM that has most. To forget what is over is no loss.
        """
        while len(self._all) > self._limits.incidents:
            incident = self._next_victim(is_settled)
            if incident.rank == RANK_KERNEL:
                self.forgotten.add(None, incident.pfn)
            if incident.rank == RANK_OF_A_VM:
                for owner in incident.owners.values():
                    if owner.vm not in incident.vm_identities and not incident.is_released(owner):
                        self.forgotten.add(owner, incident.pfn)
            if incident.rank != RANK_OVER:
                self._count_lost("incidents", 1)
            self._drop(incident)
        self.is_overfull = False

    def _next_victim(self, is_settled: Callable[[IncidentState], bool]) -> IncidentState:
        newest = next(reversed(self._all.values()))
        while self._victims:
            victim = self._victims[-1]
            incident = self._all.get(victim.id)
            if (
                incident is not None
                and incident.rank == victim.rank
                and (not victim.was_settled or is_settled(incident))
            ):
                return newest if newest.rank < victim.rank else incident
            self._victims.pop()
        if newest.rank < self._lowest:
            return newest  # it alone, as the last time: the others need not be ranked again
        ranks = {key: incident.rank for key, incident in self._all.items()}
        lowest = min(ranks.values())
        self._lowest = min((rank for key, rank in ranks.items() if key != newest.id), default=0)
        # The oldest goes first. The list is kept, so as not to rank all incidents each time.
        if lowest < RANK_OF_A_VM:
            chosen = [_Victim(lowest, key, False) for key, rank in ranks.items() if rank == lowest]
        else:
            chosen = self._victims_of_vms(is_settled)[: max(1, self._limits.incidents // 16)]
        self._victims = chosen[::-1]
        return self._all[chosen[0].id]

    def _victims_of_vms(self, is_settled: Callable[[IncidentState], bool]) -> list[_Victim]:
        """If all incidents are of VMs: those that are settled, else those of one VM."""
        settled = [one.id for one in self._all.values() if is_settled(one)]
        if settled:
            return [_Victim(RANK_OF_A_VM, key, True) for key in settled]
        most = max(self._of_vm.values(), key=len, default=self._all)
        # Forgotten remembers that a VM has the page, but not its deliveries: those go last.
        ordered = sorted(most.values(), key=lambda incident: bool(incident.deliveries))
        return [_Victim(RANK_OF_A_VM, incident.id, False) for incident in ordered]

    def merge(self, one: IncidentState, other: IncidentState) -> IncidentState:
        """Make one incident of two that are of the same page, one of them without a pfn.

        The older one remains, so that its id stays. Owners keep their places.
        """
        older, newer = (self._all[key] for key in self._all if key in (one.id, other.id))
        owners, pfn = list(newer.owners.values()), newer.pfn
        self._drop(newer)
        older.absorb(newer)
        older.frozen = None
        self.rank_anew()  # there is room for one more
        if pfn is not None:
            self.set_pfn(older, pfn)
        self.set_min_size(older, newer.size)
        for owner in owners:
            self.add_owner(older, owner, live=owner.vm not in older.vm_identities)
        for vm in older.vms:
            self._of_vm.setdefault(vm, {})[older.id] = older
        return older

    def _drop(self, incident: IncidentState) -> None:
        self._close(incident)
        del self._all[incident.id]
        for vm in incident.vms:
            self._drop_mention(incident, vm)

    def set_pfn(self, incident: IncidentState, pfn: int) -> None:
        incident.pfn = pfn
        self._by_pfn[pfn] = incident
        self.forgotten.discard(None, pfn)

    def set_min_size(self, incident: IncidentState, size: int | None) -> None:
        """At least ``size`` bytes are lost in it."""
        incident.set_min_size(size)
        if (
            incident.huge
            and incident.pfn is not None
            and self._by_pfn.get(incident.pfn) is incident
        ):
            self._huge[incident.id] = incident

    def add_owner(self, incident: IncidentState, owner: Owner, *, live: bool) -> None:
        """Add an owner of the page; a VM that is gone is not found by place any more."""
        if incident.is_kernels or incident.has_many_places(owner):
            self.give_to_kernel(incident)
            return
        if len(incident.owners) >= self._limits.owners:
            self._drop_gone_owner(incident)
        vague = (owner.vm, None)
        had_vague = vague in incident.owners
        if not incident.add_owner(owner):
            return
        if had_vague and vague not in incident.owners and self._by_place.get(vague) is incident:
            del self._by_place[vague]
        self._of_vm.setdefault(owner.vm, {})[incident.id] = incident
        self.forgotten.discard(owner, incident.pfn)
        place = (owner.vm, owner.gfn)
        if place not in incident.owners:
            return  # merged into an owner of which more is known
        holder = self._by_place.get(place)
        if live and not incident.closed and (holder is None or holder.over):
            self._by_place[place] = incident

    def _drop_gone_owner(self, incident: IncidentState) -> None:
        """Make room for a live VM."""
        place = next(
            (place for place in incident.owners if place[0] in incident.vm_identities), None
        )
        if place is None:
            return
        del incident.owners[place]
        if self._by_place.get(place) is incident:
            del self._by_place[place]
        if place[0] not in incident.vms:
            self._drop_mention(incident, place[0])
            del incident.vm_identities[place[0]]

    def give_to_kernel(self, incident: IncidentState) -> None:
        """Drop the owners: the page is the kernel's, and VMs only have it mapped."""
        incident.in_many_places = True
        self.rank_anew()
        self._unindex_places(incident)
        incident.owners.clear()
        for vm in [vm for vm, of in self._of_vm.items() if incident.id in of]:
            if vm not in incident.vms:
                self._drop_mention(incident, vm)

    def _unindex_places(self, incident: IncidentState) -> None:
        for place in incident.owners:
            if self._by_place.get(place) is incident:
                del self._by_place[place]

    def _drop_mention(self, incident: IncidentState, vm: int) -> None:
        mentions = self._of_vm.get(vm, {})
        mentions.pop(incident.id, None)
        if not mentions:
            self._of_vm.pop(vm, None)

    def add_notified_vm(self, incident: IncidentState, vm: int) -> None:
        """Note a VM that was notified of the page, whether it owns it or not."""
        known = self._of_vm.get(vm, ())
        if incident.id not in known and vm in incident.vms:
            self._of_vm.setdefault(vm, {})[incident.id] = incident

    def unpoison(self, incident: IncidentState) -> None:
        """End the search by page: its next poison is another incident.

        Its VMs may still be notified of the old poison.
        """
        self._unindex_page(incident)
        self.rank_anew()

    def release(self, incident: IncidentState, vm: int, hva: int) -> bool:
        """As ``IncidentState.release``."""
        self.rank_anew()
        return incident.release(vm, hva)

    def rank_anew(self) -> None:
        """Rank all incidents when the next one is to be forgotten: a rank has become lower."""
        self._victims.clear()
        self._lowest = RANK_OVER

    def close(self, incident: IncidentState) -> None:
        """Close an incident: nothing joins it any more. Again is the same."""
        self._close(incident)
        self.rank_anew()

    def _close(self, incident: IncidentState) -> None:
        incident.closed = True
        self._unindex_page(incident)
        self._unindex_places(incident)

    def _unindex_page(self, incident: IncidentState) -> None:
        if incident.pfn is not None and self._by_pfn.get(incident.pfn) is incident:
            del self._by_pfn[incident.pfn]
        self._huge.pop(incident.id, None)


def _thawed(incidents: Iterable[IncidentState]) -> list[IncidentState]:
    found = list(incidents)
    for incident in found:
        incident.frozen = None
    return found
