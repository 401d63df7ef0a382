"""VMs in units of systemd, in a machine whose process 1 is the lab's agent.

systemd is process 1 of a namespace of processes, with the machine's cgroups and /run. It answers to
that namespace only, so a command of the name `systemctl` enters it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from tests.lab.harness import PATIENCE, Unstageable, Vmm
from tests.lab.machine import Machine

_SYSTEMD = "/lib/systemd/systemd"

_SET_UP = """
mountpoint -q /run || mount -t tmpfs -o mode=755 run /run
mkdir -p /run/lab /run/systemd/system
cat >/run/systemd/system/lab.target <<end
[Unit]
DefaultDependencies=no
end
cat >/run/systemd/system/vm@.service <<end
[Unit]
DefaultDependencies=no
[Service]
ExecStart=/bin/sh -c 'exec vmm --name %i 0<>/run/lab/%i.steps >>/run/lab/%i.answers'
end
cat >/run/lab/vmm <<'end'
#!/bin/sh
mkfifo "/run/lab/$2.steps"
: >"/run/lab/$2.answers"
systemctl start "vm@$2.service"
tail -n +1 -f "/run/lab/$2.answers" &
exec cat >"/run/lab/$2.steps"
end
cat >/usr/local/bin/systemctl <<'end'
#!/bin/sh
read -r pid </sys/fs/cgroup/init.scope/cgroup.procs
exec nsenter --target "$pid" --pid --mount /usr/bin/systemctl "$@"
end
chmod +x /run/lab/vmm /usr/local/bin/systemctl
"""
_START = f"exec env container=lab unshare --pid --fork --kill-child --mount-proc {_SYSTEMD}"


@contextlib.contextmanager
def systemd(machine: Machine) -> Iterator[None]:
    """Run systemd during the block; the units of VMs end with it."""
    if machine.run(f"test -x {_SYSTEMD}").status:
        raise Unstageable("no systemd in this root")
    machine.run(_SET_UP, check=True)
    job = machine.start(f"{_START} --system --unit=lab.target --log-target=null")
    try:
        deadline = time.monotonic() + PATIENCE
        while machine.run("systemctl is-active lab.target").stdout != "active\n":
            assert job.poll() is None, (job.poll(), job.stderr)
            assert time.monotonic() < deadline, job.stderr
            time.sleep(0.2)
        yield
    finally:
        job.kill()
        job.wait(PATIENCE)
        machine.run("rm -rf /run/systemd /run/lab /usr/local/bin/systemctl", check=True)


def unit_of(name: str) -> str:
    """The unit of a VM."""
    return f"vm@{name}.service"


def start_unit(machine: Machine, name: str) -> Vmm:
    """Start a VM as a unit; within ``systemd``. Its pid is the machine's, not the namespace's."""
    vmm = Vmm(machine, name, program="/run/lab/vmm")
    vmm.pid = pid_of(machine, name)
    return vmm


def pid_of(machine: Machine, name: str) -> int:
    """The pid of a unit's VMM, in the machine."""
    found = machine.run(f"cat /sys/fs/cgroup/system.slice/*/{unit_of(name)}/cgroup.procs")
    return int(found.stdout)
