"""The JSON contract: what ``events --json`` and ``top --once --json`` print.

Integers are integers, fields with unknown values are absent, and VMs are named by pid, name and
uuid. Internal keys are not printed, except the id of an incident.
"""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

from kvmtrace import dimm_names, kvm, model
from kvmtrace.events import (
    ClockStep,
    Exit,
    Found,
    HwError,
    Lost,
    MachineCheck,
    Owned,
    Owner,
    Poison,
    Reboot,
    Sigbus,
    SoftOffline,
    Unpoison,
    VmGone,
    VmSeen,
)
from kvmtrace.judgement.action import Action
from kvmtrace.judgement.actions import actions
from kvmtrace.judgement.urgency import urgency_of
from kvmtrace.linux import mce
from kvmtrace.model import (
    CorrelatedEvent,
    ErrorHistory,
    Incident,
    KernelAccount,
    Notification,
    Origin,
    Snapshot,
    Vm,
    VmIdentity,
)
from kvmtrace.probes import Probe
from kvmtrace.views.timeline import finding_text


def rfc3339(ts: int) -> str:
    """Nanoseconds since the epoch → ``2026-11-23T10:00:00.123456789Z``."""
    seconds, nanos = divmod(ts, 1_000_000_000)
    when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{when:%Y-%m-%dT%H:%M:%S}.{nanos:09d}Z"


def known(**fields: Any) -> dict[str, Any]:
    """The fields that are not None, in order."""
    return {name: value for name, value in fields.items() if value is not None}


def event_line(correlated: CorrelatedEvent) -> dict[str, Any] | None:
    """One line of ``events --json``; None for events that only serve the correlator."""
    event = correlated.event
    head = {"ts": rfc3339(correlated.wall)}
    match event:
        case Exit():
            return head | known(
                kind="exit",
                vm=vm_name(correlated.vm),
                vcpu=event.vcpu,
                errno=kvm.outcome_name(event.errno, event.reason),
                reason=event.reason,
                annotated=event.annotated,
                flags=event.flags,
                private=event.private,
                gpa=event.gpa,
                gfn=event.gfn,
                size=event.size,
                access=event.access,
                cause=correlated.cause,
                count=event.count,
                incident=correlated.incident,
            )
        case Poison():
            return head | known(
                kind="poison",
                pfn=event.pfn,
                page_type=event.page_type,
                result=event.result,
                owners=[
                    known(vm=vm_name(seen), gfn=owner.gfn, hva=owner.hva)
                    for owner, seen in correlated.owners
                ],
                incident=correlated.incident,
            )
        case Sigbus():
            return head | known(
                kind="sigbus",
                vm=vm_name(correlated.vm),
                process=None if correlated.vm else known(pid=event.pid, name=event.comm),
                tid=event.tid,
                code=kvm.sigbus_code_name(event.code),
                hva=event.hva,
                lsb=event.lsb,
                vcpu=event.vcpu,
                gfn=event.gfn,
                count=event.count if event.count > 1 else None,
                incident=correlated.incident,
            )
        case HwError(check=MachineCheck() as check):
            return head | known(
                kind="mce",
                addr=event.addr,
                pfn=event.pfn,
                bank=check.bank,
                cpu=check.cpu,
                socket=check.socket,
                status=check.status,
                ipid=check.ipid,
                fru=check.fru,
                at=mce.at(check.status, check.vendor, check.bank, check.ipid),
                count=event.count if event.count > 1 else None,
                incident=correlated.incident,
            )
        case HwError():
            return head | known(
                kind="mce",
                addr=event.addr,
                pfn=event.pfn,
                socket=event.socket,
                node=event.node,
                label=(label := dimm_names.label(event.label)),
                label_names=dimm_names.names(label) if label else None,
                severity=event.severity,
                grain=event.grain,
                count=event.count,
                via=event.via,
                message=event.message,
                incident=correlated.incident,
            )
        case Owned() if correlated.owners:
            owner, seen = correlated.owners[0]
            return head | known(
                kind="owner",
                pfn=event.pfn,
                vm=vm_name(seen),
                gfn=owner.gfn,
                hva=owner.hva,
                via=event.via,
                incident=correlated.incident,
            )
        case SoftOffline():
            return head | known(
                kind="soft_offline",
                pfn=event.pfn,
                errno=kvm.errno_name(event.errno) if event.errno else None,
                incident=correlated.incident,
            )
        case Unpoison() | Found():
            return head | known(kind=event.kind, pfn=event.pfn, incident=correlated.incident)
        case VmSeen():
            seen_as = known(vmm=event.vmm, unread=event.unread)
            return head | known(kind="vm", vm=vm_name(event), state="seen") | seen_as
        case VmGone():
            return head | known(kind="vm", vm=vm_name(correlated.vm), state="gone")
        case Reboot():
            return head | {"kind": "reboot"}
        case Lost():
            return head | known(kind="lost", where=event.where, count=event.count)
        case ClockStep():
            return head | {"kind": "clock"} | _clock_step(event, correlated.wall)
    return None


def vm_name(one: VmSeen | Vm | VmIdentity | None) -> dict[str, Any] | None:
    """``{"pid", "name", "uuid", "vmid"}`` as far as known."""
    if one is None:
        return None
    return known(pid=one.pid, name=one.name, uuid=one.uuid, vmid=one.vmid)


def top(snapshot: Snapshot) -> dict[str, Any]:
    """The object that ``top --once --json`` prints."""
    host = snapshot.host
    return {
        "host": known(
            name=host.name,
            kernel=host.kernel,
            source=host.source,
            source_why=host.source_why,
            hardware_corrupted_bytes=host.hardware_corrupted_bytes,
        )
        if host
        else {},
        "probes": [probe(p) for p in snapshot.probes],
        "vms": [_vm(vm, snapshot) for vm in snapshot.vms.values()],
        "incidents": [incident(i, snapshot) for i in snapshot.incidents],
        "kernel_poisoned_pages": snapshot.kernel_pages,
        "lost": dict(snapshot.lost),
        "soft_offlined": [soft_offlined(page, snapshot) for page in snapshot.soft_offlines],
        "dimms": [
            {"label": name, **_history(of, snapshot)} for name, of in sorted(snapshot.dimms.items())
        ],
    } | known(
        kernel=_kernel(snapshot.kernel),
        clock_steps=[_clock_step(step, snapshot.wall(step.ts)) for step in snapshot.steps] or None,
    )


def _clock_step(step: ClockStep, wall: int) -> dict[str, Any]:
    return known(ts=rfc3339(wall), step_ns=step.step_ns, suspended_ns=step.suspended_ns)


def reported(pfn: int, page: model.Reported, snapshot: Snapshot) -> dict[str, Any]:
    """A page with errors that is in no incident."""
    label = page.label
    names = dimm_names.names(label) if label else None
    return known(pfn=pfn, errors=_history(page.history, snapshot), label=label, label_names=names)


def soft_offlined(
    page: model.SoftOfflinedPage,
    snapshot: Snapshot = Snapshot(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """``{"pfn", "ts", "errno", "origin"}``."""
    return known(
        pfn=page.pfn,
        ts=_when(page.ts, snapshot),
        errno=page.errno or None,
        origin=_origin(page.origin, snapshot),
    )


def probe(state: Probe) -> dict[str, Any]:
    """``{"name", "attached", "target", "via", "why", "detail"}``."""
    return known(**dataclasses.asdict(state))


def incident(state: Incident, snapshot: Snapshot) -> dict[str, Any]:
    """One incident, its owners by name."""
    return known(
        id=state.id,
        former_ids=list(state.former_ids) or None,
        pfn=state.pfn,
        state=state.state,
        page_type=state.page_type,
        result=state.result,
        page_class=state.page_class,
        poisoned_ts=_when(state.poisoned_ts, snapshot),
        owners=[_owner(owner, state, snapshot) for owner in state.owners],
        deliveries={"exits": state.exits, "sigbus": state.sigbus},
        sigbus_at_poison=state.sigbus_at_poison or None,
        sigbus_to_others=state.sigbus_to_others or None,
        first_delivery_ts=_when(state.first_delivery_ts, snapshot),
        last_delivery_ts=_when(state.last_delivery_ts, snapshot),
        bytes=state.size,
        undelivered=state.undelivered or None,
        before_start=state.before_start or None,
        unpoisoned_ts=_when(state.unpoisoned_ts, snapshot),
        rebooted_ts=_when(state.rebooted_ts, snapshot),
        origin=_origin(state.origin, snapshot),
        told=[_notification(one, state, snapshot) for one in state.notifications] or None,
        urgency=urgency_of(state),
        verdict=state.verdict,
        verdicts=[
            known(
                vm=vm_name(state.vm_identities.get(verdict.vm)),
                verdict=verdict.word,
                evidence=[finding_text(finding) for finding in verdict.evidence],
            )
            for verdict in state.verdicts
        ]
        or None,
        actions=[_action(one) for one in actions(state, snapshot)],
    )


def _action(one: Action) -> dict[str, Any]:
    return known(
        kind=one.kind,
        vm=vm_name(one.vm),
        text=one.text,
        brief=one.brief,
        reason=one.reason,
        how=one.how or None,
        commands=list(one.commands),
        never=list(one.never),
    )


def _origin(origin: Origin | None, snapshot: Snapshot) -> dict[str, Any] | None:
    if origin is None:
        return None
    return known(
        via=list(origin.via),
        severity=origin.severity,
        addr=origin.addr,
        socket=origin.socket,
        node=origin.node,
        bank=origin.bank,
        cpu=origin.cpu,
        status=origin.status,
        consumer_cpu=origin.consumer_cpu,
        consumer_socket=origin.consumer_socket,
        label=origin.label,
        label_names=dimm_names.names(origin.label) if origin.label else None,
        message=origin.message,
        errors=_history(origin.history, snapshot),
        dimm=_history(origin.dimm, snapshot) if origin.dimm else None,
    )


def _history(history: ErrorHistory, snapshot: Snapshot) -> dict[str, Any]:
    return {
        "count": history.count,
        "corrected": history.corrected,
        "first_ts": _when(history.first_ts, snapshot),
        "last_ts": _when(history.last_ts, snapshot),
    }


def _notification(one: Notification, state: Incident, snapshot: Snapshot) -> dict[str, Any]:
    return known(
        vm=vm_name(state.vm_identities.get(one.vm)),
        vcpu=one.vcpu,
        exits=one.exits,
        sigbus=dict(one.sigbus),
        first_ts=_when(one.first_ts, snapshot),
        last_ts=_when(one.last_ts, snapshot),
    )


def _kernel(account: KernelAccount | None) -> dict[str, Any] | None:
    if account is None:
        return None
    return known(
        at_start=dict(account.at_start),
        now=dict(account.now),
        handled=account.handled,
        seen=account.seen,
        missed=account.missed,
    )


def _vm(vm: Vm, snapshot: Snapshot) -> dict[str, Any]:
    return known(
        pid=vm.pid,
        name=vm.name,
        uuid=vm.uuid,
        vmid=vm.vmid,
        unread=vm.unread,
        vmm=vm.vmm,
        exits=vm.exits_by_errno(),
        causes=vm.exits_by_cause(),
        sigbus=dict(vm.sigbus),
        poisoned_pages=vm.poisoned_pages,
        last_ts=_when(vm.last_ts, snapshot),
        gone=vm.gone or None,
        undelivered=vm.undelivered or None,
        forgotten_pages=vm.forgotten_pages or None,
    )


def _owner(owner: Owner, state: Incident, snapshot: Snapshot) -> dict[str, Any]:
    vm = vm_name(snapshot.vms.get(owner.vm)) or vm_name(state.vm_identities.get(owner.vm))
    released = True if owner in state.released else None
    party = state.vm_identities.get(owner.vm)
    gone = True if party is not None and party.gone_ts is not None else None
    return known(vm=vm, gfn=owner.gfn, hva=owner.hva, released=released, gone=gone)


def _when(ts: int | None, snapshot: Snapshot) -> str | None:
    return None if ts is None else rfc3339(snapshot.wall(ts))
