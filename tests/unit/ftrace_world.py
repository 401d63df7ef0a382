"""Records as ftrace delivers them, and a translator for them."""

from __future__ import annotations

import itertools
from typing import Any

from kvmtrace.events import Event, Exit
from kvmtrace.sources.ftrace.records import Record
from kvmtrace.sources.ftrace.translator import FtraceTranslator
from kvmtrace.sources.ftrace.vms import VmResolver
from kvmtrace.sources.vm_table import VmTable

VM, VCPU, PID, TID = 0xFFFF800000000000, 0xFFFF900000000000, 4194300, 4194301
HANDLER = 0xFFFFFFFFC0001000
GFN = 0x108


class World:
    """A translator, and records with a clock of their own."""

    def __init__(self, watches_gmem: bool = True) -> None:
        self.translator = FtraceTranslator(VmResolver(VmTable("/nonexistent"), lambda tid: None))
        self.translator.exits.watches_gmem = watches_gmem
        self._ts = itertools.count(1_000_000_000, 1000)
        self.exits = 0

    def record(self, probe: str, **fields: Any) -> Record:
        base = {"common_pid": TID, "kvm": VM, "tgid": PID}
        return Record(next(self._ts), probe, base | fields)

    def gmem(self, ret: int, gfn: int = GFN, caller: int = HANDLER + 0x1D1, **other: Any) -> Record:
        slot = {"base": 0x100, "npages": 64, "hva": 0x7F0000000000, "flags": 4}
        slot |= {"as_id": 0, "pgoff": 0, "ino": 77}
        return self.record("gmem", gfn=gfn, ret=ret, __probe_ret_ip=caller, **slot | other)

    def faultin(self, ret: int, gfn: int = GFN, **other: Any) -> Record:
        self.exits += 1
        known = {"vcpu": VCPU, "vid": 0, "exits": self.exits, "gfn": gfn, "pfn": 0}
        known |= {"write": 1, "exec": 0, "private": 0, "prefetch": 0, "__probe_func": HANDLER}
        return self.record("faultin", ret=ret, **known | other)

    def run(self, ret: int, reason: int = 39, gpa: int = GFN << 12, **other: Any) -> Record:
        known = {"vcpu": VCPU, "vid": 0, "exits": self.exits, "reason": reason}
        known |= {"gpa": gpa, "flags": 0, "size": 4096}
        return self.record("run", ret=ret, **known | other)

    def feed(self, *records: Record, **options: Any) -> list[Event]:
        return self.translator.batch(records, next(self._ts), **options)

    def exits_of(self, *records: Record, **options: Any) -> list[Exit]:
        return [e for e in self.feed(*records, **options) if isinstance(e, Exit)]


def poisoned(world: World) -> list[Event]:
    """A poisoned page is touched."""
    return world.feed(world.gmem(-133), world.faultin(-133), world.run(-133))


def sigbus(world: World, probe: str = "sigbus", **other: Any) -> Record:
    known = {"code": 4, "addr": 0x7F0000008000, "lsb": 12, "tid": TID}
    if probe == "sigbus_forced":
        del known["tid"]
    return world.record(probe, **known | other)
