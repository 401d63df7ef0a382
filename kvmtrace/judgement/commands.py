"""Shell commands for a VM, by who runs it: libvirt, Proxmox VE, systemd or nobody that is known.

kvmtrace prints them and runs none; docs/runbook.md has which were tried. qm's commands are those of
src/PVE/CLI/qm.pm of qemu-server: each waits for its end. An API's requests are those of the OpenAPI
documents of Cloud Hypervisor (vm.power-button) and Firecracker (SendCtrlAltDel, x86 only). What a
tenant can name is quoted, or replaced by a UUID or a number.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from kvmtrace.model import VmIdentity

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# What systemd.unit(5) allows; not a dash in front, which would be an option.
_UNIT = re.compile(r"[A-Za-z0-9:_.\\][A-Za-z0-9:_.\\@-]{0,255}")
# virsh takes digits for the number of a running domain, and a dash for an option.
_PLAIN_NAME = re.compile(r"(?=.*[A-Za-z_])[A-Za-z0-9_][\w.+-]{0,23}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Commands:
    """Lines for a shell; ``how``: by what and on which condition they work, "" without either."""

    lines: tuple[str, ...] = ()
    how: str = ""


# A transient domain is gone once it is destroyed: there is nothing to start.
_LIBVIRT = "with libvirt, if persistent"
# In Debian there is none of these VMMs to try them with.
_UNTRIED = " (not tried)"
_PROXMOX = f"with Proxmox VE{_UNTRIED}"
_SYSTEMD = "with systemd"

# {VMM: the request that asks its guest to shut down, and by what}
_POWER_BUTTONS = {
    "cloud-hypervisor": (
        "http://localhost/api/v1/vm.power-button",
        f"with Cloud Hypervisor's API{_UNTRIED}",
    ),
    "firecracker": (
        "http://localhost/actions -H 'Content-Type: application/json'"
        """ -d '{"action_type": "SendCtrlAltDel"}'""",
        f"with Firecracker's API, on x86{_UNTRIED}",
    ),
}


def stop_and_start(vm: VmIdentity | None) -> Commands:
    """Commands that stop a VM at once and start it. Without a way to start it: those that stop."""
    if vmid := _of_proxmox(vm):
        return Commands((f"qm stop {vmid} && qm start {vmid}",), _PROXMOX)
    if virsh := _for_virsh(vm):
        return Commands((f"virsh destroy {virsh} && virsh start {virsh}",), _LIBVIRT)
    if unit := _unit(vm):
        return Commands((f"systemctl restart {unit}",), _SYSTEMD)
    return stop(vm)


def stop(vm: VmIdentity | None) -> Commands:
    """Commands that stop a VM at once."""
    if vmid := _of_proxmox(vm):
        return Commands((f"qm stop {vmid}",), _PROXMOX)
    if virsh := _for_virsh(vm):
        return Commands((f"virsh destroy {virsh}",), "with libvirt")
    if unit := _unit(vm):
        return Commands((f"systemctl stop {unit}",), _SYSTEMD)
    return Commands((f"kill {vm.pid}",)) if vm is not None else Commands()


def shut_down(vm: VmIdentity | None) -> Commands:
    """Commands that ask a VM's guest to shut down, and start it again when it has."""
    if vmid := _of_proxmox(vm):
        return Commands((f"qm shutdown {vmid} && qm start {vmid}",), _PROXMOX)
    if virsh := _for_virsh(vm):
        # virsh shutdown does not wait; start fails until the guest is down.
        return Commands((f"virsh shutdown {virsh}", f"virsh start {virsh}"), _LIBVIRT)
    socket = (vm.api_socket if vm else None) or ""
    if vm is None or vm.vmm not in _POWER_BUTTONS or not socket.startswith("/"):
        return Commands()
    request, how = _POWER_BUTTONS[vm.vmm]
    start: tuple[str, ...] = ()
    if unit := _unit(vm):
        # The request does not wait, and a unit that still runs is not started.
        start = (f"tail --pid={vm.pid} -f /dev/null && systemctl start {unit}",)
    return Commands((f"curl --unix-socket {shlex.quote(socket)} -X PUT {request}", *start), how)


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


def _unit(vm: VmIdentity | None) -> str | None:
    """The systemd unit that is this VM alone, quoted; None if there is none."""
    unit = (vm.unit if vm is not None else None) or ""
    return shlex.quote(unit) if _UNIT.fullmatch(unit) else None


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
