"""Names of VMs by where they are: paths of their sockets, and their cgroups.

Pure; nothing here is cleaned yet (``identity.clean``).
"""

from __future__ import annotations

import re

# What sockets are called whatever VM they are of, and what VMMs are called.
_SOCKET_WORDS = frozenset(
    "api sock socket control ctl ctrl qmp hmp monitor mon vm vmm server main http rest rpc grpc "
    "ipc cmd command console serial vsock uds pid pidfile process "
    "cloud hypervisor cloudhypervisor ch clh chv firecracker fc crosvm qemu kvm kvmtool lkvm "
    "stratovirt dragonball dbs alioth krun libkrun krunvm microvm runsc gvisor virtualbox acrn dm "
    "libvirt kata".split()
)
# What directories are called that hold files of any VM, or the directories of VMs.
_LAYOUT = _SOCKET_WORDS | frozenset(
    "run var tmp temp root lib lib64 libexec bin usr opt srv mnt media home data state cache share "
    "shared local etc dev shm proc internal private public common current default base global "
    "vms vmms microvms virtualmachines machine machines instance instances guest guests domain "
    "domains sandbox sandboxes container containers pod pods task tasks shim shims session "
    "sessions virtual hypervisors jail jails jailer jailed chroot chroots rootfs fs bundle "
    "bundles work workdir workspace sockets socks pids runtime runtimes io containerd crio "
    "docker moby podman oci k8s kubernetes kubelet vc sbs storage disk disks drives volumes image "
    "images log logs conf config configs service services system user users node host hosts "
    "virt virtualization running active live app apps files store pool overlay meta metadata "
    "userdata alloc allocs nomad k3s rancher "
    "snap incus lxd lxc openstack nova proxmox cuttlefish assembly runner runners daemon agent "
    "backend channel channels out output exec dir tree ns namespace namespaces".split()
)
_VERSION = re.compile(r"v[0-9]+")
_BUILD = re.compile(r"(firecracker|cloud-hypervisor|crosvm|qemu|stratovirt)[-_]v?[0-9]+\.[0-9]")


def name_of_path(path: str) -> str | None:
    """What is particular to a VM's own file: its name or the nearest directory's.

    None where it is found at a place that is the same for any VM.
    """
    *directories, base = [part for part in path.split("/") if part not in ("", ".", "..")] or [""]
    stem = re.sub(r"\.(sock|socket|pid|qmp|mon)$|-socket$", "", base)
    if stem and not _is_of(stem, _SOCKET_WORDS):
        return stem
    while directories:
        part = directories.pop()
        above = directories[-1] if directories else ""
        if above == "home" or (above == "user" and part.isdecimal()):
            return None  # whose it is, which other VMs may be too
        if not _is_of(part, _LAYOUT):
            return part
    return None


def _is_of(name: str, words: frozenset[str]) -> bool:
    """Made of these words only: "io.containerd.runtime.v2.task", "firecracker-v1.7.0-x86_64"."""
    first, *rest = [word for word in re.split(r"[-_.]", name.lower()) if word] or [""]
    if first not in words and name.lower() not in words:
        return False
    if _BUILD.match(name.lower()):
        return True
    return all(word in words or _VERSION.fullmatch(word) for word in rest)


# -- cgroups

_SCOPE = re.compile(r"machine-([^/\n]+)\.scope")
_LIBVIRT = re.compile(r"(?:qemu|ch|xen|vz|bhyve)-\d+-(.+)", re.DOTALL)
_POD = re.compile(r"pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})")
_CONTAINER = re.compile(
    r"(docker|libpod|crio|cri-containerd)[-/](?:payload-)?([0-9a-f]{12})[0-9a-f]{52}\b"
)
_UNIT = re.compile(r"/([^/@\n]+)@([^/\n]+)\.service")
# What people are logged in by, whatever they start.
_LOGINS = frozenset("user getty serial-getty container-getty autovt ssh sshd".split())
_PROXMOX = re.compile(r"/qemu\.slice/([0-9]{1,12})\.scope")


def machine_of_cgroup(text: str) -> str | None:
    """A machine's name (systemd-machined, libvirt)."""
    scope = _SCOPE.search(text)
    if scope is None:
        return None
    machine = _systemd_unescape(scope[1])
    libvirt = _LIBVIRT.fullmatch(machine)
    return libvirt[1] if libvirt else machine


def instance_of_cgroup(text: str) -> str | None:
    """The UID of its pod (Kubernetes), its container, or the instance of its systemd unit."""
    if pod := _POD.search(text):
        return f"pod-{pod[1].replace('_', '-')}"
    if container := _CONTAINER.search(text):
        return container[2]
    units = [unit for unit in _UNIT.findall(text) if unit[0] not in _LOGINS]
    return _systemd_unescape(units[-1][1]) if units else None


def vmid_of_cgroup(text: str) -> str | None:
    vmid = _PROXMOX.search(text)
    return vmid[1] if vmid else None


def _systemd_unescape(name: str) -> str:
    raw = re.sub(
        rb"\\x([0-9a-fA-F]{2})", lambda match: bytes([int(match[1], 16)]), name.encode("utf-8")
    )
    return raw.decode("utf-8", "replace")
