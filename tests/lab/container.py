"""kvmtrace in a container of a real runtime (crun), with what the DaemonSet's manifest asks for.

The image is the machine's own root, where the Debian package is installed, as the Containerfile
does it. What a node's runtime adds is made here as containerd does by default: namespaces, its own
/proc, /sys and /dev, masked paths. Not here: its seccomp and AppArmor profiles, a network.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmtrace import data_files
from tests.lab.harness import PATIENCE
from tests.lab.machine import Job, Machine

_BUNDLE = "/run/kvmtrace-bundle"
_ENVIRONMENT = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
# containerd, pkg/oci/spec.go: the defaults of a Linux container
_MASKED = (
    "/proc/acpi /proc/asound /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list "
    "/proc/timer_stats /proc/sched_debug /proc/scsi /sys/firmware "
    "/sys/devices/virtual/powercap"
).split()
_READ_ONLY = "/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger".split()
_DEFAULT_MOUNTS = (
    ("/proc", "proc", "proc", "nosuid,noexec,nodev"),
    ("/dev", "tmpfs", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
    ("/dev/pts", "devpts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
    ("/dev/shm", "tmpfs", "shm", "nosuid,noexec,nodev,mode=1777,size=65536k"),
    ("/dev/mqueue", "mqueue", "mqueue", "nosuid,noexec,nodev"),
    ("/sys", "sysfs", "sysfs", "nosuid,noexec,nodev,ro"),
    ("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid,noexec,nodev,relatime,ro"),
)


@dataclass(frozen=True)
class Manifest:
    """What the DaemonSet asks for. ``mounts``: {path in the container: path of the node}."""

    arguments: tuple[str, ...]
    capabilities: tuple[str, ...]
    mounts: dict[str, str]


def manifest(path: Path | None = None) -> Manifest:
    """Read the manifest; it is written so that no YAML library is needed."""
    path = path or data_files.directory("assets") / "container/kvmtrace-daemonset.yaml"
    text = path.read_text()
    listed = re.search(r"^ +args: \[(.*)\]$", text, re.MULTILINE)
    added = re.search(r"^ +add:\n((?: +- \w+.*\n)+)", text, re.MULTILINE)
    assert listed
    assert added
    of_node = dict(re.findall(r"- \{name: (\w+), hostPath: \{path: ([\w/]+)", text))
    inside = re.findall(r"- \{name: (\w+), mountPath: ([\w/]+)\}", text)
    assert inside
    return Manifest(
        tuple(one.strip(' "') for one in listed[1].split(",")),
        tuple(re.findall(r"- (\w+)", added[1])),
        {where: of_node[name] for name, where in inside},
    )


def _spec(wanted: Manifest, node: dict[str, str]) -> dict[str, Any]:
    capabilities = [f"CAP_{name}" for name in wanted.capabilities]
    mounts = [
        {"destination": where, "type": kind, "source": source, "options": options.split(",")}
        for where, kind, source, options in _DEFAULT_MOUNTS
    ]
    # The image has no group kvmtrace (Containerfile); this root does.
    group = {"destination": "/etc/group", "type": "bind", "source": f"{_BUNDLE}/group"}
    mounts.append(group | {"options": ["bind", "ro"]})
    for where, path in wanted.mounts.items():
        bind = {"destination": where, "type": "bind", "source": node.get(path, path)}
        mounts.append(bind | {"options": ["rbind", "rprivate", "rw"]})
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/usr/bin/kvmtrace", *wanted.arguments],
            "env": _ENVIRONMENT,
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": mounts,
        "linux": {
            # hostPID: no namespace of PIDs
            "namespaces": [{"type": one} for one in ("mount", "ipc", "uts", "network", "cgroup")],
            "maskedPaths": _MASKED,
            "readonlyPaths": _READ_ONLY,
        },
    }


class Container:
    """A running one; ``job`` is kvmtrace in it.

    ``node``: directories of the machine to mount in the place of those that the manifest names.
    """

    def __init__(self, machine: Machine, wanted: Manifest, node: dict[str, str]) -> None:
        self._machine = machine
        lines = [f"mkdir -p {_BUNDLE}/rootfs {' '.join(node.values())}"]
        lines.append(f"mountpoint -q {_BUNDLE}/rootfs || mount --bind / {_BUNDLE}/rootfs")
        lines.append(f"grep -v ^kvmtrace: /etc/group >{_BUNDLE}/group")
        lines.append(f"cat >{_BUNDLE}/config.json")
        machine.run("\n".join(lines), check=True, stdin=json.dumps(_spec(wanted, node)))
        self.job: Job = machine.start(f"cd {_BUNDLE} && exec crun run kvmtrace")

    def run(self, command: str) -> str:
        """Run a command of the machine in the container's network."""
        pid = json.loads(self._machine.run("crun state kvmtrace", check=True).stdout)["pid"]
        line = f"nsenter --net --target {pid} {command}"
        return self._machine.run(line, PATIENCE, check=True).stdout

    def end(self) -> None:
        """Stop it as a node does, and wait for its end."""
        self._machine.run("crun kill kvmtrace TERM", check=True)
        assert self.job.wait(PATIENCE) == 0, self.job.tail()
