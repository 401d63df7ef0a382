"""Shell commands for a VM, by who runs it: libvirt, Proxmox VE or nobody that is known.

kvmtrace prints them and runs none. virsh was tried (libvirt 11.3); qm's are those of qm(1). What a
tenant can name is quoted, or replaced by a UUID or a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvmtrace.model import VmIdentity

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# virsh takes digits for the number of a running domain, and a dash for an option.
_PLAIN_NAME = re.compile(r"(?=.*[A-Za-z_])[A-Za-z0-9_][\w.+-]{0,23}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Commands:
    """Lines for a shell; ``how``: by what and on which condition they work, "" without either."""

    lines: tuple[str, ...] = ()
    how: str = ""


# A transient domain is gone once it is destroyed: there is nothing to start.
_LIBVIRT = "with libvirt, if persistent"
_PROXMOX = "with Proxmox VE"


def stop_and_start(vm: VmIdentity | None) -> Commands:
    """Commands that stop a VM at once and start it. Without a way to start it: those that stop."""
    if vmid := _of_proxmox(vm):
        return Commands((f"qm stop {vmid} && qm start {vmid}",), _PROXMOX)
    if virsh := _for_virsh(vm):
        return Commands((f"virsh destroy {virsh} && virsh start {virsh}",), _LIBVIRT)
    return stop(vm)


def stop(vm: VmIdentity | None) -> Commands:
    """Commands that stop a VM at once."""
    if vmid := _of_proxmox(vm):
        return Commands((f"qm stop {vmid}",), _PROXMOX)
    if virsh := _for_virsh(vm):
        return Commands((f"virsh destroy {virsh}",), "with libvirt")
    return Commands((f"kill {vm.pid}",)) if vm is not None else Commands()


def shut_down(vm: VmIdentity | None) -> Commands:
    """Commands that ask a VM's guest to shut down, and start it again when it has."""
    if vmid := _of_proxmox(vm):
        return Commands((f"qm shutdown {vmid} && qm start {vmid}",), _PROXMOX)
    if virsh := _for_virsh(vm):
        # virsh shutdown does not wait; start fails until the guest is down.
        return Commands((f"virsh shutdown {virsh}", f"virsh start {virsh}"), _LIBVIRT)
    return Commands()


def reset(vm: VmIdentity | None) -> Commands:
    """Commands that reset a VM of QEMU."""
    if vmid := _of_proxmox(vm):
        return Commands((f"qm reset {vmid}",), _PROXMOX)
    if virsh := _for_virsh(vm):
        return Commands((f"virsh reset {virsh}",), "with libvirt")
    return Commands()


def ways_to_reset(vm: VmIdentity | None) -> str:
    """The same for a sentence, with that of QEMU's monitor."""
    lines = "".join(reset(vm).lines)
    if _of_proxmox(vm):
        return f"Proxmox VE: {lines}"
    return "monitor: system_reset" + (f"; libvirt: {lines}" if lines else "")


def _of_proxmox(vm: VmIdentity | None) -> str | None:
    """The number of a VM that Proxmox VE started; libvirt does not have it."""
    vmid = vm.vmid if vm is not None and vm.vmm == "qemu" else None
    return vmid if vmid and re.fullmatch("[0-9]{1,12}", vmid) else None


def _for_virsh(vm: VmIdentity | None) -> str | None:
    """The VM's name or uuid for virsh, safe to paste into a shell; None if it is not libvirt's."""
    # libvirt's VMs of QEMU's all have a UUID. Names are what tenants chose.
    if vm is None or vm.vmm != "qemu" or not _UUID.fullmatch(vm.uuid or ""):
        return None
    return vm.name if vm.name and _PLAIN_NAME.fullmatch(vm.name) else vm.uuid
