"""libvirt runs a VM that has lost a page: what kvmtrace prints for virsh is typed, and helps."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator

from kvmtrace.judgement import commands
from kvmtrace.model import VmIdentity
from tests.lab.harness import PATIENCE, Line, Unstageable, end_following, serving
from tests.lab.machine import Machine
from tests.lab.qemu_guest import (
    FIRMWARE,
    UNTOUCHED,
    advised,
    poison_guest,
    write_firmware,
)

NAME, UUID = "tenant-8", "0b7f1c52-6a1e-4d0b-8f3c-5f3a2c9d7e18"
_CONSOLE = "/tmp/libvirt.console"

# Of its own daemons only libvirtd runs: no logs by virtlogd, no cgroups by machined.
_CONFIG = """
mkdir -p /etc/libvirt
cat >/etc/libvirt/qemu.conf <<end
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
stdio_handler = "file"
namespaces = []
cgroup_controllers = []
end
echo 'auth_unix_rw = "none"' >/etc/libvirt/libvirtd.conf
"""
_DOMAIN = f"""<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{NAME}</name>
  <uuid>{UUID}</uuid>
  <memory unit='MiB'>64</memory>
  <memoryBacking><allocation mode='immediate'/></memoryBacking>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <loader readonly='yes' type='rom'>{FIRMWARE}</loader>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-chardev'/><qemu:arg value='file,id=console,path={_CONSOLE}'/>
    <qemu:arg value='-device'/><qemu:arg value='isa-debugcon,iobase=0x402,chardev=console'/>
  </qemu:commandline>
</domain>
"""


@contextlib.contextmanager
def _libvirt(machine: Machine) -> Iterator[None]:
    """Run libvirtd, with the domain running, during the block."""
    if machine.run("command -v libvirtd && command -v virsh").status:
        raise Unstageable("no libvirt in this root")
    write_firmware(machine)
    machine.run(_CONFIG, check=True)
    machine.run(f"cat >/tmp/domain.xml <<'end'\n{_DOMAIN}end\n", check=True)
    daemon = machine.start("exec libvirtd")
    try:
        _until(machine, "virsh define /tmp/domain.xml")
        machine.run(f"virsh start {NAME}", timeout=PATIENCE, check=True)
        yield
    finally:
        machine.run(f"virsh destroy {NAME}; virsh undefine {NAME}", timeout=PATIENCE)
        daemon.kill()
        daemon.wait(PATIENCE)


def _until(machine: Machine, command: str) -> None:
    """Type a command until it succeeds."""
    deadline = time.monotonic() + PATIENCE
    while (result := machine.run(command, timeout=PATIENCE)).status:
        assert time.monotonic() < deadline, (command, result)
        time.sleep(0.5)


def _pid(machine: Machine) -> int:
    return int(machine.run(f"cat /run/libvirt/qemu/{NAME}.pid", check=True).stdout)


def libvirt_advice(machine: Machine, source: str) -> None:
    """Shut down and start, reset, destroy and start: each is typed as it is printed."""
    end_following(machine)
    with serving(machine, f"--source {source}"), _libvirt(machine):
        told, pid = _lose_a_page(machine), _pid(machine)
        shut_down, reset = (action["commands"] for action in told["actions"][:2])
        assert shut_down == [f"virsh shutdown {NAME}", f"virsh start {NAME}"]
        for command in shut_down:
            _until(machine, command)
        assert _pid(machine) != pid
        advised(machine, told["pfn"], "nothing: ")

        # The lab's guest does not get stuck: this is what is printed if one does.
        told, pid = _lose_a_page(machine), _pid(machine)
        of = told["owners"][0]["vm"]
        assert (of["name"], of["uuid"]) == (NAME, UUID)
        (stop_and_start,) = commands.stop_and_start(
            VmIdentity(1, pid, of["name"], of["uuid"], "qemu")
        ).lines
        assert stop_and_start == f"virsh destroy {NAME} && virsh start {NAME}"
        machine.run(stop_and_start, timeout=PATIENCE, check=True)
        assert _pid(machine) != pid
        advised(machine, told["pfn"], "nothing: ")

        told = _lose_a_page(machine)
        assert reset == [f"virsh reset {NAME}"]
        machine.run(reset[0], timeout=PATIENCE, check=True)
        advised(machine, told["pfn"], "nothing: another page was put in place of the lost one")


def _lose_a_page(machine: Machine) -> Line:
    """Poison a page that the guest has not touched; return what `explain` has on it."""
    _until(machine, f"grep up {_CONSOLE}")
    pfn = poison_guest(machine, _pid(machine), UNTOUCHED)["pfn"]
    advised(machine, pfn, "virsh reset")
    command = ["kvmtrace", "explain", f"{pfn:#x}", "--json"]
    (told,) = json.loads(machine.run(command, timeout=PATIENCE, check=True).stdout)
    return dict(told)
