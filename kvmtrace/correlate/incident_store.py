"""The register of incidents: by page, by place in a VM, by VM; and which one is forgotten first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

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
from kvmtrace.correlate.limits import Limits
from kvmtrace.events import Owner


class IncidentStore:
    """All incidents that are remembered; every index points at one of those, never elsewhere."""

    def __init__(
        self, limits: Limits, lose: Callable[[str, int], None], page: int = 1 << kvm.PAGE_SHIFT
    ) -> None:
        self._limits = limits
        self._page = page
        self._lose = lose
        self._all: OrderedDict[str, IncidentState] = OrderedDict()
        self._by_pfn: dict[int, IncidentState] = {}
        self._huge: dict[str, IncidentState] = {}
        self._by_place: dict[GuestPlace, IncidentState] = {}
        self._of_vm: dict[int, dict[str, IncidentState]] = {}
        self._serial: BoundedDict[str, int] = BoundedDict(4 * limits.incidents)
        # To be forgotten, the next one last: rank, id, and whether it was settled.
        self._next: list[tuple[int, str, bool]] = []
        self.forgotten = Forgotten(4 * limits.incidents)

    def __iter__(self) -> Iterator[IncidentState]:
        return iter(self._all.values())

    # -- finding

    def at_pfn(self, pfn: int) -> IncidentState | None:
        """The incident that this page is lost in now."""
        exact = self._by_pfn.get(pfn)
        if exact is not None:
            return exact
        return next((state for state in self._huge.values() if state.covers_pfn(pfn)), None)

    def within(self, covers: Callable[[int], bool]) -> list[IncidentState]:
        """Incidents whose page fulfils a condition."""
        return [state for pfn, state in self._by_pfn.items() if covers(pfn)]

    def at_place(self, vm: int, gfn: int | None) -> IncidentState | None:
        """The incident that this place of a live VM is in: at it, or within a huge page's loss."""
        exact = self._by_place.get((vm, gfn))
        if exact is not None or gfn is None or not self._huge:
            return exact
        mine = (state for state in self._of_vm.get(vm, {}).values() if state.id in self._huge)
        return next((state for state in mine if state.place_of_gfn(vm, gfn)), None)

    def known_by(self, vm: int, gfn: int | None) -> int | None:
        """The gfn by which the loss that this one is in is known."""
        state = self.at_place(vm, gfn) if gfn is not None else None
        owner = state.place_of_gfn(vm, gfn) if state is not None and gfn is not None else None
        return gfn if owner is None else owner.gfn

    def of(self, vm: int) -> list[IncidentState]:
        """Incidents with this VM among their owners, in the order in which it came to be."""
        return list(self._of_vm.get(vm, {}).values())

    # -- changing

    def open(self, stem: str) -> IncidentState:
        """A new incident; its id is the stem and a number. ``trim`` once it has its owners."""
        number = self._serial.get(stem, 0) + 1
        while f"{stem}-{number}" in self._all:  # the number was forgotten, the incident not
            number += 1
        self._serial[stem] = number
        state = IncidentState(f"{stem}-{number}", self._limits, self._lose, self._page)
        self._all[state.id] = state
        return state

    def trim(self, settled: Callable[[IncidentState], bool]) -> None:
        """Forget what there is no room for: what is over, then what belongs to nobody.

        Then what is ``settled``, and of the rest what is oldest, of the VM that has most. To forget
        what is over is no loss.
        """
        while len(self._all) > self._limits.incidents:
            state = self._victim(settled)
            if state.rank == RANK_KERNEL:
                self.forgotten.forget(None, state.pfn)
            if state.rank == RANK_OF_A_VM:
                for owner in state.owners.values():
                    if owner.vm not in state.parties and not state.is_released(owner):
                        self.forgotten.forget(owner, state.pfn)
            if state.rank != RANK_OVER:
                self._lose("incidents", 1)
            self._drop(state)

    def _victim(self, settled: Callable[[IncidentState], bool]) -> IncidentState:
        newest = next(reversed(self._all.values()))
        while self._next:
            rank, key, was_settled = self._next[-1]
            state = self._all.get(key)
            if state is not None and state.rank == rank and (not was_settled or settled(state)):
                return newest if newest.rank < rank else state
            self._next.pop()
        ranks = {key: state.rank for key, state in self._all.items()}
        lowest = min(ranks.values())
        # The oldest is taken first, and further ones without looking at all of them again.
        if lowest < RANK_OF_A_VM:
            chosen = [(lowest, key, False) for key, rank in ranks.items() if rank == lowest]
        else:
            chosen = self._of_vms(settled)[: max(1, self._limits.incidents // 16)]
        self._next = chosen[::-1]
        return self._all[chosen[0][1]]

    def _of_vms(self, settled: Callable[[IncidentState], bool]) -> list[tuple[int, str, bool]]:
        """Where all belong to VMs: what they came to terms with, else what has most of them."""
        over = [(RANK_OF_A_VM, key, True) for key, state in self._all.items() if settled(state)]
        if over:
            return over
        most = max(self._of_vm.values(), key=len, default=self._all)
        # That a VM has a page outlives its incident, its deliveries do not.
        ordered = sorted(most.values(), key=lambda state: bool(state.told))
        return [(RANK_OF_A_VM, state.id, False) for state in ordered]

    def _drop(self, state: IncidentState) -> None:
        self._leave(state)
        del self._all[state.id]
        for vm in state.vms:
            self._forget_mention(state, vm)

    def name_page(self, state: IncidentState, pfn: int) -> None:
        """The page of an incident is known."""
        state.pfn = pfn
        self._by_pfn[pfn] = state
        self.forgotten.remember(None, pfn)

    def grow(self, state: IncidentState, size: int | None) -> None:
        """So many bytes are lost in it at least."""
        state.grow(size)
        if state.huge and state.pfn is not None and self._by_pfn.get(state.pfn) is state:
            self._huge[state.id] = state

    def own(self, state: IncidentState, owner: Owner, *, live: bool) -> None:
        """An owner of the page; exits of a VM that is gone are not looked for by place."""
        if state.disowned or state.is_elsewhere(owner):
            self.disown(state)
            return
        if len(state.owners) >= self._limits.owners:
            self._drop_gone_owner(state)
        vague = (owner.vm, None)
        had_vague = vague in state.owners
        if not state.own(owner):
            return
        if had_vague and vague not in state.owners and self._by_place.get(vague) is state:
            del self._by_place[vague]
        self._of_vm.setdefault(owner.vm, {})[state.id] = state
        self.forgotten.remember(owner, state.pfn)
        place = (owner.vm, owner.gfn)
        if place not in state.owners:
            return  # one place with another that is known better
        holder = self._by_place.get(place)
        if live and not state.closed and (holder is None or holder.over):
            self._by_place[place] = state

    def _drop_gone_owner(self, state: IncidentState) -> None:
        """VMs that are gone make room for those that live."""
        place = next((place for place in state.owners if place[0] in state.parties), None)
        if place is None:
            return
        del state.owners[place]
        if self._by_place.get(place) is state:
            del self._by_place[place]
        if place[0] not in state.vms:
            self._forget_mention(state, place[0])
            del state.parties[place[0]]

    def disown(self, state: IncidentState) -> None:
        """It turned out to be the kernel's: VMs only have it mapped."""
        state.shared_out = True
        self._leave_places(state)
        state.owners.clear()
        for vm in [vm for vm, of in self._of_vm.items() if state.id in of]:
            if vm not in state.vms:
                self._forget_mention(state, vm)

    def _leave_places(self, state: IncidentState) -> None:
        for place in state.owners:
            if self._by_place.get(place) is state:
                del self._by_place[place]

    def _forget_mention(self, state: IncidentState, vm: int) -> None:
        mentions = self._of_vm.get(vm, {})
        mentions.pop(state.id, None)
        if not mentions:
            self._of_vm.pop(vm, None)

    def told(self, state: IncidentState, vm: int) -> None:
        """A VM that was notified of the page, whether it owns it or not."""
        if vm in state.vms:
            self._of_vm.setdefault(vm, {})[state.id] = state

    def unpoison(self, state: IncidentState) -> None:
        """The page may be poisoned anew; its VMs may still be notified of the old poison."""
        self._leave_pages(state)
        self._next.clear()

    def close(self, state: IncidentState) -> None:
        """Nothing joins it any more."""
        self._leave(state)
        self._next.clear()

    def _leave(self, state: IncidentState) -> None:
        state.closed = True
        self._leave_pages(state)
        self._leave_places(state)

    def _leave_pages(self, state: IncidentState) -> None:
        if state.pfn is not None and self._by_pfn.get(state.pfn) is state:
            del self._by_pfn[state.pfn]
        self._huge.pop(state.id, None)
