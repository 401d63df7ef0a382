"""Made-up snapshots for the tests of the views."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvmtrace.events import Host, Owner
from kvmtrace.model import HistoryState, Incident, IncidentStatus, Snapshot, Vm
from kvmtrace.probes import Probe

SECOND = 1_000_000_000
NOW = 1_790_000_000 * SECOND

HOST = Host("db-host-17", "6.18.12+deb14-amd64", "bpf", "BTF and ring buffer", 20480)
PROBES = (
    Probe("run", True, "kvm_arch_vcpu_ioctl_run", "fexit"),
    Probe("gmem", True, "kvm_gmem_get_pfn", "kretprobe"),
    Probe("mce", False, why="no such tracepoint"),
)


def vm(key: int, name: str | None = None, **fields: object) -> Vm:
    plain = Vm(key, 4000 + key, name, None, "qemu", {}, {}, 0, None, False)
    return replace(plain, **fields)  # type: ignore[arg-type]


HISTORY = HistoryState(
    path="/var/lib/kvmtrace/history.db",
    is_written=True,
    size=81920,
    oldest_ns=NOW - 86_400 * SECOND,
    last_write_ns=NOW - SECOND,
    written=12,
    waiting=0,
    dropped={"no_room": 0, "unwritable": 0},
    deleted={"age": 3, "size": 0},
    errors=1,
)


def empty() -> Snapshot:
    return Snapshot(host=HOST, probes=PROBES)


def small() -> Snapshot:
    """Four VMs, and an incident in every state."""
    vms = [
        vm(
            1,
            "web-1",
            uuid="11111111-2222-3333-4444-555555555555",
            exits={("EHWPOISON", "hwpoison"): 200000, ("EFAULT", "conversion"): 12},
            sigbus={"AR": 2},
            poisoned_pages=2,
            last_ts=NOW - 12 * SECOND,
        ),
        vm(
            2,
            "database-with-a-long-name",
            exits={
                ("EHWPOISON", "hwpoison"): 1,
                ("EFAULT", "backing"): 3,
                ("EFAULT", None): 4,
                ("EINVAL", "other"): 5,
            },
            sigbus={"AO": 1},
            poisoned_pages=1,
            last_ts=NOW - 300 * SECOND,
        ),
        vm(3, None, vmm=None),
        vm(
            4, "batch", exits={("EHWPOISON", "hwpoison"): 1}, gone=True, last_ts=NOW - 9000 * SECOND
        ),
    ]
    lru, free = "dirty unevictable LRU page", "free buddy page"
    ago = [NOW - seconds * SECOND for seconds in (60, 400, 30, 500, 9001)]
    incidents = (
        Incident(
            "1032a0-1", IncidentStatus.LATENT, 0x1032A0, lru, "Failed", ago[2], (Owner(1, 0x44),)
        ),
        Incident(
            "103275-1",
            IncidentStatus.LOOPING,
            0x103275,
            lru,
            "Failed",
            ago[0],
            (Owner(1, 0x1F000, 0x7F0000000000),),
            exits=200000,
            sigbus=2,
            first_delivery_ts=ago[0] + 12_000_000,
            last_delivery_ts=NOW - 12 * SECOND,
        ),
        Incident(
            "200-1",
            IncidentStatus.DELIVERED,
            0x200,
            lru,
            "Recovered",
            ago[1],
            (Owner(2, 0x1234), Owner(99, None)),
            exits=1,
            sigbus=1,
            first_delivery_ts=ago[1] + 90 * SECOND,
            last_delivery_ts=NOW - 300 * SECOND,
        ),
        Incident("88-1", IncidentStatus.UNOWNED, 0x88, free, "Recovered", ago[3], ()),
        Incident(
            "g77-1",
            IncidentStatus.CLOSED,
            None,
            None,
            None,
            None,
            (Owner(4, 0x77),),
            exits=1,
            first_delivery_ts=NOW - 9000 * SECOND,
            last_delivery_ts=NOW - 9000 * SECOND,
        ),
    )
    return Snapshot(
        vms={v.key: v for v in vms},
        incidents=incidents,
        poisons={(lru, "Failed"): 2, (lru, "Recovered"): 1, (free, "Recovered"): 1},
        lost={"ring buffer": 7},
        last_ts=NOW,
        host=HOST,
        probes=PROBES,
    )


def many(count: int = 300) -> Snapshot:
    vms = {
        k: vm(k, f"vm-{k:03d}", exits={("EFAULT", "conversion"): k}) for k in range(1, count + 1)
    }
    return Snapshot(vms=vms, host=HOST, probes=PROBES)


def odd() -> Snapshot:
    """Names that are wide, long or look like markup, and many unknown fields."""
    names = ["数据库" * 12, "[red]x[/red]", "x" * 200, "naïve-e\u0301-ü", None, "🦊🦊"]
    vms = {
        key: vm(key, name, vmm=None, exits={("EFAULT", None): 10**12 * (key % 2)})
        for key, name in enumerate(names, 1)
    }
    incident = Incident(
        "vm1-1", IncidentStatus.DELIVERED, None, None, None, None, (Owner(1, None), Owner(2, 3))
    )
    unheard_of: Any = "quarantined"
    newer = replace(incident, id="vm2-1", state=unheard_of, owners=(Owner(3, 2**40),))
    return Snapshot(vms=vms, incidents=(incident, newer))
