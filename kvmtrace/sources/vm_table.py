"""VMs as a source meets them: ``struct kvm`` pointers and processes become VM keys.

The address of a ``struct kvm`` is used again after kvm_destroy_vm, so a key belongs to one
(pointer, generation); sources that count generations in the kernel pass them, others get a new key
because ``gone`` or ``began`` forgot the old one.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

from kvmtrace import sanitize
from kvmtrace.events import Event, VmGone, VmSeen
from kvmtrace.linux.proc_reader import Unreadable
from kvmtrace.vmm import identity, processes

# kvm_destroy_vm runs after the process has closed its files; a VM whose process has been gone for
# this long without it was missed.
_MISSED_NS = 3_000_000_000
_LOOKS = 8  # in one of so many looks a process is asked when it began
# So many processes are searched for a descriptor in one look, whatever the number of VMs: each
# costs 4 µs for every descriptor that it holds.
_SEARCHES = 16


@dataclass(slots=True)
class _Known:
    key: int
    pid: int
    struct: tuple[int, int] | None
    named: bool
    since: int
    begun: str | None = None
    """When its process began, by which it differs from another of the same pid."""
    gone_since: int | None = None
    descriptor: str | None = None
    """By which its process was last seen to hold a VM."""
    unread: bool = False
    """Its process could not be looked up."""


class VmTable:
    """Hands out VM keys and the VmSeen and VmGone events that go with them.

    Every method takes the time of the event that led to it, in nanoseconds since the epoch.
    """

    def __init__(self, proc: str = "/proc") -> None:
        self._proc = proc
        self._keys = itertools.count(1)
        self._by_struct: dict[tuple[int, int], _Known] = {}
        self._by_pid: dict[int, list[_Known]] = {}
        self._looks = 0
        self._searches = 0  # in this look

    def scan(self, ts: int) -> list[Event]:
        """VMs that are there already, as many as their processes have descriptors of.

        Those of one process are alike until the kernel reports the address of one.
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
        """The key of the VM at address ``struct``, used by process ``pid``; VmSeen if it is new.

        ``comm`` names it where the process has ended before anyone could look.
        """
        known = self._by_struct.get((struct, generation))
        if known is None and not generation:
            known = self._unplaced(pid)
            if known is not None:
                known.struct = (struct, generation)
                self._by_struct[known.struct] = known
        if known is None:
            event = self._add(pid, (struct, generation), ts, comm)
            return event.vm, [event]
        if not known.named:
            again = self._seen(known, ts, comm)
            if known.named:
                return known.key, [again]
        return known.key, []

    def began(
        self, struct: int, pid: int, ts: int, *, generation: int = 0, comm: str | None = None
    ) -> list[Event]:
        """A VM begins at this address; one that was there before has ended, or ``gone`` said so."""
        missed = [before for before in self.generations(struct) if before != (generation or None)]
        events: list[Event] = [self._forget(self._by_struct[struct, old], ts) for old in missed]
        if (struct, generation) in self._by_struct:
            return events  # another event reported it first
        # It may have been found by its process before its beginning was read.
        found = next(
            (k for k in self._by_pid.get(pid, ()) if k.struct is None and k.since >= ts), None
        )
        if found is not None:
            found.struct = (struct, generation)
            self._by_struct[found.struct] = found
            return events
        return [*events, self._add(pid, (struct, generation), ts, comm)]

    def generations(self, struct: int) -> list[int]:
        """Of the VMs at this address whose end was not reported."""
        return [generation for at, generation in self._by_struct if at == struct]

    def gone(
        self, struct: int, pid: int, ts: int, *, generation: int = 0, comm: str | None = None
    ) -> list[Event]:
        """kvm_destroy_vm ran for this VM, in process ``pid``; VmSeen too if nobody knew of it."""
        known = self._by_struct.get((struct, generation))
        if known is None:
            # Found in the moment of its end, it passes for the next one at this address.
            found = (self._by_struct[struct, other] for other in self.generations(struct))
            known = next(found, None)
        if known is None and not generation:
            # Of several any key would do. What is known of one was learnt while it was alone: the
            # first.
            known = next(reversed(self._all_unplaced(pid)), None)
        if known is not None:
            return [self._forget(known, ts)]
        seen = self._add(pid, (struct, generation), ts, comm)
        return [seen, self._forget(self._by_struct[struct, generation], ts)]

    def _unplaced(self, pid: int) -> _Known | None:
        """A VM of this process that was there before the first event, so in no later generation."""
        return next(iter(self._all_unplaced(pid)), None)

    def _all_unplaced(self, pid: int) -> list[_Known]:
        return [known for known in self._by_pid.get(pid, ()) if known.struct is None]

    def of_pid(self, pid: int) -> list[int]:
        """Keys of the VMs that a process runs."""
        return [known.key for known in self._by_pid.get(pid, ())]

    def struct_of(self, key: int) -> tuple[int, int] | None:
        """Address of the struct kvm, and its generation; None if that was never reported."""
        return next((at for at, known in self._by_struct.items() if known.key == key), None)

    def pids(self) -> dict[int, list[int]]:
        """{pid: keys} of all live VMs."""
        return {pid: [known.key for known in all_] for pid, all_ in self._by_pid.items()}

    def missed(self, ts: int) -> list[Event]:
        """VMs whose end no probe reported: their process is no more, or holds no VM any longer.

        Another process may have its pid by then.
        """
        events: list[Event] = []
        self._looks += 1
        self._searches = 0
        for known in self._in_turn():
            if known.gone_since is not None and ts - known.gone_since < _MISSED_NS:
                continue
            if self._is_there(known):
                known.gone_since = None
                if known.unread:
                    events += self._look_again(known, ts)
            elif known.gone_since is None:
                known.gone_since = ts
            else:
                events.append(self._forget(known, ts))
        return events

    def _in_turn(self) -> list[_Known]:
        """All VMs; of many, other ones come first each time."""
        all_ = [known for of_pid in self._by_pid.values() for known in of_pid]
        first = self._looks * _SEARCHES % len(all_) if len(all_) > _SEARCHES else 0
        return all_[first:] + all_[:first]

    def _is_there(self, known: _Known) -> bool:
        """As far as anybody can say."""
        if known.struct is not None:  # the kernel reports its end
            told_apart = known.begun is not None
            return self._is_same_process(known) and (told_apart or self._holds_vm(known))
        if known.descriptor and identity.is_vm_descriptor(known.pid, known.descriptor, self._proc):
            return self._is_same_process(known, exists=True)
        return self._is_same_process(known) and self._holds_vm(known)

    def _holds_vm(self, known: _Known) -> bool:
        if known.gone_since is None and self._searches >= _SEARCHES:
            return True
        self._searches += 1
        try:
            known.descriptor = processes.vm_descriptor(known.pid, self._proc)
        except Unreadable:
            return True
        return known.descriptor is not None

    def _look_again(self, known: _Known, ts: int) -> list[Event]:
        found = processes.identify(known.pid, self._proc)
        return [] if found.unread else [self._seen(known, ts, None, found)]

    def _is_same_process(self, known: _Known, *, exists: bool = False) -> bool:
        if not exists and not os.path.exists(f"{self._proc}/{known.pid}"):
            return False
        if known.gone_since is None and (self._looks + known.key) % _LOOKS:
            return True
        begun = identity.begun(known.pid, self._proc)
        return begun is None or known.begun is None or begun == known.begun

    def _add(
        self,
        pid: int,
        struct: tuple[int, int] | None,
        ts: int,
        comm: str | None = None,
        found: processes.VmProcess | None = None,
    ) -> VmSeen:
        begun = identity.begun(pid, self._proc)
        known = _Known(next(self._keys), pid, struct, named=False, since=ts, begun=begun)
        if struct is not None:
            self._by_struct[struct] = known
        self._by_pid.setdefault(pid, []).append(known)
        return self._seen(known, ts, comm, found)

    def _seen(
        self, known: _Known, ts: int, comm: str | None, found: processes.VmProcess | None = None
    ) -> VmSeen:
        found = found or processes.identify(known.pid, self._proc)
        who = found.identity
        known.named, known.unread = who.name is not None, found.unread is not None
        name = who.name or (sanitize.clean(comm) if comm else None)
        return VmSeen(
            ts, known.key, known.pid, name, who.uuid, who.vmm, who.vmid, unread=found.unread
        )

    def _forget(self, known: _Known, ts: int) -> VmGone:
        if known.struct is not None:
            self._by_struct.pop(known.struct, None)
        all_ = self._by_pid[known.pid]
        all_.remove(known)
        if not all_:
            del self._by_pid[known.pid]
        return VmGone(ts, known.key)
