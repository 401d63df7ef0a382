"""Pages that memory_failure cannot isolate: the kernel's own, and the shared zero page."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping

from tests.lab.harness import (
    PATIENCE,
    Line,
    Unstageable,
    Vmm,
    can_inject_poison,
    recorded,
    replayed,
)
from tests.lab.machine import Machine
from tests.lab.scenarios import Scenario

# What poisons pages by kind. Bits of /proc/kpageflags
# (include/uapi/linux/kernel-page-flags.h): 7 slab, 10 free (buddy), 19 poisoned, 26 a page table.
_POISON = '''
import json, mmap, os, re, struct, subprocess, sys

BEGIN = 0x1000  # a machine that has just booted has slab pages in low memory only

def first(bit, at=BEGIN):
    with open("/proc/kpageflags", "rb") as flags:
        flags.seek(at * 8)
        while block := flags.read(1 << 19):
            for (entry,) in struct.iter_unpack("Q", block):
                if entry >> bit & 1 and not entry >> 19 & 1:
                    return at
                at += 1

area = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area[0]  # read only: the zero page
import ctypes
hva = ctypes.addressof(ctypes.c_char.from_buffer(area))
with open("/proc/self/pagemap", "rb") as table:
    table.seek(hva // mmap.PAGESIZE * 8)
    (entry,) = struct.unpack("Q", table.read(8))

def poison(pfn):
    try:
        with open("/sys/kernel/debug/hwpoison/corrupt-pfn", "w") as corrupt:
            corrupt.write(f"{pfn:#x}")
    except OSError:
        pass  # EBUSY: it is poisoned, but the kernel could not handle it
    return pfn

def of_kind(bit, verdict):
    """Poison a page of a kind, or the next one: the verdict shows if that had changed before."""
    pfn = BEGIN - 1
    for _ in range(16):
        at = first(bit, pfn + 1)
        if at is None:  # all there were have been freed: others have come meanwhile
            pfn = BEGIN - 1
            continue
        pfn = poison(at)
        log = subprocess.run(["dmesg"], capture_output=True, text=True).stdout
        if re.search(rf"{pfn:#x}: recovery action for {verdict}", log):
            return pfn
    sys.exit(f"no page with bit {bit} of /proc/kpageflags could be poisoned")

KINDS = {
    "zero": lambda: poison(entry & (1 << 55) - 1),
    "slab": lambda: of_kind(7, ".*: Ignored"),
    "table": lambda: of_kind(26, ".*: Ignored"),
    "free": lambda: of_kind(10, "free buddy page: Recovered"),
}
print(json.dumps({kind: KINDS[kind]() for kind in sys.argv[1:]}))
'''


def poisoned(machine: Machine, *kinds: str) -> dict[str, int]:
    """Poison a page of each kind, one of "zero", "slab", "table", "free"; {kind: pfn}.

    The zero page can be poisoned only once.
    """
    found = machine.run(["python3", "-c", _POISON, *kinds], check=True).stdout
    return dict(json.loads(found))


def kernel_pages(machine: Machine, source: str) -> None:
    """Poison a page of each kind: the host is reported at risk, and no VM as having lost a page."""
    if not can_inject_poison(machine):
        raise Unstageable("no hwpoison-inject")
    vmms = [Vmm(machine, name) for name in ("left", "right")]
    for vmm in vmms:
        vmm.step("create v backing=anon pages=64")
        for page in (3, 4):
            vmm.step(f"touch v +{page}")  # read only: the zero page
    with contextlib.ExitStack() as stack:
        sources = ("bpf", "ftrace") if source == "both" else (source,)
        logs = [stack.enter_context(recorded(machine, one)) for one in sources]
        pages = poisoned(machine, "zero", "slab", "table", "free")
    for log in logs:
        _judge(machine, log, pages, {vmm.pid for vmm in vmms})
    for vmm in vmms:
        vmm.end()


def _judge(machine: Machine, log: str, pages: Mapping[str, int], pids: Collection[int]) -> None:
    judged = {kind: _explain(machine, log, pfn) for kind, pfn in pages.items()}
    for kind in ("zero", "slab", "table"):
        one = judged[kind]
        assert one["result"] == "Ignored", one
        assert (one["page_class"], one["state"], one["owners"]) == ("kernel", "unowned", []), one
        assert "reboot this host" in one["next"][0]
    free = judged["free"]
    assert (free["page_type"], free["result"]) == ("free buddy page", "Recovered")
    assert free["page_class"] == "handled"
    assert free["next"][0].startswith("nothing: ")
    model = replayed(machine, log)
    assert model["kernel_poisoned_pages"] == 3
    assert [vm["poisoned_pages"] for vm in model["vms"] if vm["pid"] in pids] == [0, 0]
    assert model["lost"] == {}


def _explain(machine: Machine, log: str, pfn: int) -> Line:
    command = ["kvmtrace", "explain", hex(pfn), "--json", "--from", log]
    (incident,) = json.loads(machine.run(command, timeout=PATIENCE, check=True).stdout)
    return dict(incident)


# These need a machine of their own: the pages stay poisoned. Sources record at the same time.
KERNEL_PAGES = Scenario(kernel_pages, boot={"memory": "2G"}, sources=("both",))
