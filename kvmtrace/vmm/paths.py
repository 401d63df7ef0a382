"""Names of VMs from paths (of sockets and disks) and from cgroups.

Pure functions. Results are not cleaned yet (``sanitize.clean``).
"""

from __future__ import annotations

import re

# Words in names of sockets that do not name a VM, and names of VMMs.
_SOCKET_WORDS = frozenset(
    "api sock socket control ctl ctrl qmp hmp monitor mon vm vmm server main http rest rpc grpc "
    "ipc cmd command console serial vsock uds pid pidfile process "
    "cloud hypervisor cloudhypervisor ch clh chv firecracker fc crosvm qemu kvm kvmtool lkvm "
    "stratovirt dragonball dbs alioth krun libkrun krunvm microvm runsc gvisor virtualbox acrn dm "
    "libvirt kata".split()
)
# Words in names of directories that do not name a VM.
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
# Words in names of disks and their directories that do not name a VM.
_DISK_WORDS = frozenset(
    "disk disks drive hda hdb sda sdb vda vdb root rootfs rootdisk os boot system data userdata "
    "image img overlay cow base base0 snapshot snapshots delta active linked box template clone "
    "ovmf edk2 uefi efi bios nvram code vars 2m 4m secboot ms snakeoil "
    "seed cidata init meta user config conf cfg vmconfig fcconfig json toml yaml "
    "qcow2 qcow raw vmdk vdi vhd vhdx ext4 ext3 xfs btrfs squashfs erofs".split()
)
# Words for the system on a disk.
_SYSTEM_WORDS = frozenset(
    "cloudimg server cloud generic genericcloud nocloud minimal live desktop mini daily release "
    "ubuntu debian fedora centos rhel rocky alma almalinux oracle opensuse suse leap tumbleweed "
    "alpine arch archlinux gentoo nixos void kali freebsd openbsd netbsd windows win linux "
    "coreos flatcar fcos bionic focal jammy noble plucky questing resolute buster bullseye "
    "bookworm trixie forky sid stable testing lts "
    "amd64 x86 x64 arm64 aarch64 riscv64 i386 i686".split()
)
_EXTENSION = re.compile(
    r"(?:\.(?:qcow2?|qed|raw|img|vmdk|vdi|vhdx?|ext[234]|xfs|squashfs|erofs|fd|bin|json|cfg|toml"
    r"|ya?ml|image|disk|part))+$",
    re.IGNORECASE,
)
# The suffix for one of several disks: "web-1-disk0", "vm-100-disk-0".
_PART = re.compile(
    r"(?<=.)(?:[-_.](?:disk|root|rootfs|rootdisk|os|boot|data|system|[hsv]da|overlay)[-_.]?[0-9]*)+$",
    re.IGNORECASE,
)
_A_DEVICE = re.compile(
    r"proc/.*|dev/(?:fd(?:set)?/.*|(?:sd|vd|hd|xvd)[a-z]+\d*|(?:dm-|loop|nbd|rbd|md|sr|ram)\d+.*"
    r"|nvme\d+n\d+(?:p\d+)?|mmcblk\d+.*|stdin|zero|null)",
    re.DOTALL,
)
_VERSION = re.compile(r"v[0-9]+")
_BUILD = re.compile(r"(firecracker|cloud-hypervisor|crosvm|qemu|stratovirt)[-_]v?[0-9]+\.[0-9]")


def name_of_path(path: str) -> str | None:
    """Return the part of a VM's socket path that names the VM: the file's name or a directory's.

    None if the path could be any VM's.
    """
    *directories, base = [part for part in path.split("/") if part not in ("", ".", "..")] or [""]
    stem = re.sub(r"\.(sock|socket|pid|qmp|mon)$|-socket$", "", base)
    stem = re.sub(r"^qmp[-_]|[-_]qmp$", "", stem) or stem
    if stem and not _is_of(stem, _SOCKET_WORDS):
        return stem
    return _name_of_directory(directories)


def name_of_disk(path: str) -> str | None:
    """As ``name_of_path``, for a disk image, whose name may only describe its content."""
    *directories, base = [part for part in path.split("/") if part not in ("", ".", "..")] or [""]
    if base.lower().endswith(".iso") or _A_DEVICE.fullmatch("/".join((*directories, base))):
        return None
    stem = _PART.sub("", _EXTENSION.sub("", base))
    parts = [part for part in re.split(r"[-_.]", stem.lower()) if part]
    words = {part for part in parts if not part.isdecimal()}
    if words - _SOCKET_WORDS - _DISK_WORDS - _SYSTEM_WORDS:
        return stem
    numbered = len(words) < len(parts) and not words & (_DISK_WORDS | _SYSTEM_WORDS)
    if numbered:
        return stem  # "vm-100"; but "disk-0" and "debian-12" do not name a VM
    # A directory of images may name them by their systems.
    return (
        _name_of_directory(directories, _DISK_WORDS | _SYSTEM_WORDS)
        or (stem if words & _SYSTEM_WORDS else None)
        or _name_of_directory(directories, _DISK_WORDS)
    )


def _name_of_directory(directories: list[str], words: frozenset[str] = frozenset()) -> str | None:
    """Return the nearest directory whose name is not made of words for any VM."""
    for at in reversed(range(len(directories))):
        part, above = directories[at], directories[at - 1] if at else ""
        if above == "home" or (above == "user" and part.isdecimal()):
            return None  # a user's name, who may have other VMs
        if not _is_of(part, _LAYOUT | words):
            return part
    return None


def _is_of(name: str, words: frozenset[str]) -> bool:
    """Whether a name is made of these words: "io.containerd.runtime", "firecracker-v1.7.0"."""
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
# Units of login sessions, which may start anything.
_LOGINS = frozenset("user getty serial-getty container-getty autovt ssh sshd".split())
_PROXMOX = re.compile(r"/qemu\.slice/([0-9]{1,12})\.scope")


def machine_of_cgroup(text: str) -> str | None:
    """Return a machine's name (systemd-machined, libvirt)."""
    scope = _SCOPE.search(text)
    if scope is None:
        return None
    machine = _systemd_unescape(scope[1])
    libvirt = _LIBVIRT.fullmatch(machine)
    return libvirt[1] if libvirt else machine


def instance_of_cgroup(text: str) -> str | None:
    """Return the UID of the pod (Kubernetes), the container's id, or the unit's instance."""
    if pod := _POD.search(text):
        return f"pod-{pod[1].replace('_', '-')}"
    if container := _CONTAINER.search(text):
        return container[2]
    units = [unit for unit in _UNIT.findall(text) if unit[0] not in _LOGINS]
    return _systemd_unescape(units[-1][1]) if units else None


def unit_of_cgroup(text: str) -> str | None:
    """Return the systemd unit that is an instance of a template: nothing but this VM.

    None for any other unit: that of a daemon may have all VMs. None for units of users, which the
    system's systemd does not manage.
    """
    units = _UNIT.findall(text)
    if not units or any(name in _LOGINS for name, _ in units):
        return None
    return "{}@{}.service".format(*units[-1])


def vmid_of_cgroup(text: str) -> str | None:
    """Return Proxmox VE's number of the VM."""
    vmid = _PROXMOX.search(text)
    return vmid[1] if vmid else None


def _systemd_unescape(name: str) -> str:
    raw = re.sub(
        rb"\\x([0-9a-fA-F]{2})", lambda match: bytes([int(match[1], 16)]), name.encode("utf-8")
    )
    return raw.decode("utf-8", "replace")
