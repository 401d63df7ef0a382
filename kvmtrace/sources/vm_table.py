"""Keys of VMs, by their ``struct kvm`` pointers and processes.

The address of a ``struct kvm`` is reused after kvm_destroy_vm, so a key belongs to one (pointer,
generation). Sources that count generations in the kernel pass them. The others get a new key
because ``destroyed`` or ``created`` removed the old one.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

from kvmtrace import sanitize
from kvmtrace.events import Event, VmGone, VmSeen
from kvmtrace.linux.proc_reader import Unreadable
from kvmtrace.vmm import identity, processes

# kvm_destroy_vm runs after the process has closed its files. If the process has been gone for this
# long, no probe reported it.
_REAP_NS = 3_000_000_000
_ROUNDS = 8  # the start time of a process is read in one of so many looks at a VM
# In one call of ``reap`` so many VMs are looked at, in turn, whatever their number.
_LOOKS = 512
# In one call of ``reap`` so many processes are searched for a descriptor, however many VMs there
# are: a search costs 4 µs for each descriptor that the process holds.
_SEARCHES = 16
# A process that could not be searched to the end is searched again after so many calls, and later:
# a tenant's process may have any number of descriptors.
_PAUSE, _MAX_PAUSE = 8, 256


@dataclass(slots=True)
class _Entry:
    key: int
    pid: int
    struct: tuple[int, int] | None
    named: bool
    since: int
    begun: str | None = None
    """When its process began: a later process of the same pid has another time."""
    gone_since: int | None = None
    descriptor: str | None = None
    """The descriptor by which its process was last seen to hold a VM."""
    searched_at: int = 0
    """Before this call of ``reap`` its process is not searched again."""
    pause: int = _PAUSE
    looks: int = 0
    unread: bool = False
    """Whether its process could not be looked up."""


class VmTable:
    """All VMs that are known, with their keys; methods return the VmSeen and VmGone events.

    ``ts`` is the time of the event that led to the call, in nanoseconds since the epoch.
    """

    def __init__(self, proc: str = "/proc") -> None:
        self._proc = proc
        self._keys = itertools.count(1)
        self._by_struct: dict[tuple[int, int], _Entry] = {}
        self._by_pid: dict[int, list[_Entry]] = {}
        self._rounds = 0
        self._searches = 0  # in this round
        self._next = 0  # in this round the first VM to be looked at
        self._ending: dict[int, _Entry] = {}  # by key: VMs that are not there any more, it seems

    def scan(self, ts: int) -> list[Event]:
        """Add the VMs that exist already, as many as their processes have descriptors of.

        VMs of one process are interchangeable until the kernel reports the address of one.
        """
        events: list[Event] = []
        for pid, count in processes.vm_processes(self._proc).items():
            new = max(1, count) - len(self._by_pid.get(pid, ()))
            if new > 0:
                found = processes.identify(pid, self._proc)
                events += [self._add(pid, None, ts, found=found) for _ in range(new)]
        return events

    def key(
        self, struct: int, pid: int, ts: int, *, generation: int = 0, comm: str | None = None
    ) -> tuple[int, list[Event]]:
        """Return the key of the VM at ``struct``, used by process ``pid``, and VmSeen if it is new.

        ``comm``: the VM's name if the process has ended before it could be looked up.
        """
        entry = self._by_struct.get((struct, generation))
        if entry is None and not generation:
            entry = self._without_address(pid)
            if entry is not None:
                entry.struct = (struct, generation)
                self._by_struct[entry.struct] = entry
        if entry is None:
            event = self._add(pid, (struct, generation), ts, comm)
            return event.vm, [event]
        if not entry.named:
            again = self._seen(entry, ts, comm)
            if entry.named:
                return entry.key, [again]
        return entry.key, []

    def created(
        self, struct: int, pid: int, ts: int, *, generation: int = 0, comm: str | None = None
    ) -> list[Event]:
        """Add the VM that was created at this address.

        Remove an earlier one that is still known.
        """
        missed = [before for before in self.generations(struct) if before != (generation or None)]
        events: list[Event] = [self._remove(self._by_struct[struct, old], ts) for old in missed]
        if (struct, generation) in self._by_struct:
            return events  # another event reported it first
        # ``scan`` may have found it before this event was read.
        found = next(
            (k for k in self._by_pid.get(pid, ()) if k.struct is None and k.since >= ts), None
        )
        if found is not None:
            found.struct = (struct, generation)
            self._by_struct[found.struct] = found
            return events
        return [*events, self._add(pid, (struct, generation), ts, comm)]

    def generations(self, struct: int) -> list[int]:
        """Return the generations of the VMs at this address whose end was not reported."""
        return [generation for at, generation in self._by_struct if at == struct]

    def destroyed(
        self, struct: int, pid: int, ts: int, *, generation: int = 0, comm: str | None = None
    ) -> list[Event]:
        """Remove the VM for which kvm_destroy_vm ran in process ``pid``.

        Add it first if it is new.
        """
        entry = self._by_struct.get((struct, generation))
        if entry is None:
            # If it was found while it ended, it was taken for the next one at this address.
            found = (self._by_struct[struct, other] for other in self.generations(struct))
            entry = next(found, None)
        if entry is None and not generation:
            # Any key of the process would do. The first one may have been the only VM for a time,
            # and have an incident, so the last one goes.
            entry = next(reversed(self._all_without_address(pid)), None)
        if entry is not None:
            return [self._remove(entry, ts)]
        seen = self._add(pid, (struct, generation), ts, comm)
        return [seen, self._remove(self._by_struct[struct, generation], ts)]

    def _without_address(self, pid: int) -> _Entry | None:
        """Return a VM of this process without an address: it existed before the first event."""
        return next(iter(self._all_without_address(pid)), None)

    def _all_without_address(self, pid: int) -> list[_Entry]:
        return [entry for entry in self._by_pid.get(pid, ()) if entry.struct is None]

    def of_pid(self, pid: int) -> list[int]:
        """Return the keys of a process's VMs."""
        return [entry.key for entry in self._by_pid.get(pid, ())]

    def struct_of(self, key: int) -> tuple[int, int] | None:
        """Return a VM's address and generation; None if they were never reported."""
        return next((at for at, entry in self._by_struct.items() if entry.key == key), None)

    def pids(self) -> dict[int, list[int]]:
        """Return {pid: keys} of all VMs."""
        return {pid: [entry.key for entry in all_] for pid, all_ in self._by_pid.items()}

    def reap(self, ts: int) -> list[Event]:
        """Remove VMs whose end no probe reported: their process is gone, or holds no VM any more.

        Another process may have its pid by then.
        """
        events: list[Event] = []
        self._rounds += 1
        self._searches = 0
        for entry in self._in_turn():
            if entry.gone_since is not None and ts - entry.gone_since < _REAP_NS:
                continue
            if self._is_there(entry):
                entry.gone_since = None
                self._ending.pop(entry.key, None)
                if entry.unread:
                    events += self._identify_again(entry, ts)
            elif entry.gone_since is None:
                entry.gone_since = ts
                self._ending[entry.key] = entry
            else:
                events.append(self._remove(entry, ts))
        return events

    def _in_turn(self) -> list[_Entry]:
        """Return the VMs to look at: those that may have ended, and others in turn."""
        all_ = [entry for of_pid in self._by_pid.values() for entry in of_pid]
        if len(all_) <= _SEARCHES:
            return all_
        if len(all_) <= _LOOKS:
            first = self._rounds * _SEARCHES % len(all_)
            return all_[first:] + all_[:first]
        first = self._next % len(all_)
        self._next = first + _LOOKS
        others = [*all_[first : self._next], *all_[: max(0, self._next - len(all_))]]
        return [*self._ending.values(), *(e for e in others if e.key not in self._ending)]

    def _is_there(self, entry: _Entry) -> bool:
        """Whether the VM exists, as far as is known."""
        if entry.struct is not None:  # the kernel reports its end
            if not self._is_same_process(entry):
                return False
            return entry.begun is not None or self._holds_vm(entry)
        if entry.descriptor and identity.is_vm_descriptor(entry.pid, entry.descriptor, self._proc):
            return self._is_same_process(entry, exists=True)
        return self._is_same_process(entry) and self._holds_vm(entry)

    def _holds_vm(self, entry: _Entry) -> bool:
        if entry.gone_since is None and (
            self._searches >= _SEARCHES or self._rounds < entry.searched_at
        ):
            return True
        self._searches += 1
        try:
            entry.descriptor = processes.vm_descriptor(entry.pid, self._proc)
        except Unreadable:
            entry.searched_at = self._rounds + entry.pause
            entry.pause = min(2 * entry.pause, _MAX_PAUSE)
            return True
        entry.pause = _PAUSE
        return entry.descriptor is not None

    def _identify_again(self, entry: _Entry, ts: int) -> list[Event]:
        found = processes.identify(entry.pid, self._proc)
        return [] if found.unread else [self._seen(entry, ts, None, found)]

    def _is_same_process(self, entry: _Entry, *, exists: bool = False) -> bool:
        if not exists and not os.path.exists(f"{self._proc}/{entry.pid}"):
            return False
        entry.looks += 1
        if entry.gone_since is None and (entry.looks + entry.key) % _ROUNDS:
            return True
        begun = identity.begun(entry.pid, self._proc)
        return begun is None or entry.begun is None or begun == entry.begun

    def _add(
        self,
        pid: int,
        struct: tuple[int, int] | None,
        ts: int,
        comm: str | None = None,
        found: processes.VmProcess | None = None,
    ) -> VmSeen:
        begun = identity.begun(pid, self._proc)
        entry = _Entry(next(self._keys), pid, struct, named=False, since=ts, begun=begun)
        if struct is not None:
            self._by_struct[struct] = entry
        self._by_pid.setdefault(pid, []).append(entry)
        return self._seen(entry, ts, comm, found)

    def _seen(
        self, entry: _Entry, ts: int, comm: str | None, found: processes.VmProcess | None = None
    ) -> VmSeen:
        found = found or processes.identify(entry.pid, self._proc)
        who = found.identity
        entry.named, entry.unread = who.name is not None, found.unread is not None
        name = who.name or (sanitize.clean(comm) if comm else None)
        names = (name, who.uuid, who.vmm, who.vmid)
        place = {"unit": who.unit, "api_socket": who.api_socket}
        return VmSeen(ts, entry.key, entry.pid, *names, unread=found.unread, **place)

    def _remove(self, entry: _Entry, ts: int) -> VmGone:
        self._ending.pop(entry.key, None)
        if entry.struct is not None:
            self._by_struct.pop(entry.struct, None)
        all_ = self._by_pid[entry.pid]
        all_.remove(entry)
        if not all_:
            del self._by_pid[entry.pid]
        return VmGone(ts, entry.key)
