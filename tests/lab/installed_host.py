"""A host on which kvmtrace was installed from its Debian package: what its admin does and sees."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvmtrace.views.incident_log import INCIDENT_ID
from tests.lab import debian_package
from tests.lab.harness import PATIENCE, Vmm
from tests.lab.service_host import PACKAGE, Disk, Release, ServiceHost

MEMBER = "oncall"
"""A user of the group kvmtrace."""


class InstalledHost:
    """A host of a Debian release, from its first boot on. ``disk``: an empty one."""

    def __init__(self, directory: Path, release: Release, disk: Disk | None = None) -> None:
        self.release = release
        self.package = debian_package.built(release.suite)
        self.disk = disk or Disk.new(directory / "disk.img")
        self.machine = ServiceHost.boot_disk(self.disk, self.package, release)

    def install(self) -> None:
        """Install the package, as an admin does; the service is ready then."""
        self.run(f"cd /mnt/share && apt-get install -y --no-install-recommends ./{PACKAGE}")

    def boot_again(self) -> None:
        """Boot the disk, once the machine has ended."""
        self.machine = ServiceHost.boot_disk(self.disk, self.package, self.release)

    def reboot(self) -> None:
        """Reboot it in an orderly way."""
        self.machine.reboot()
        self.boot_again()

    def run(self, line: str, timeout: float = PATIENCE) -> str:
        """Run a line of shell as root; it has to succeed."""
        return self.machine.run(line, timeout, check=True).stdout

    def wall_time(self) -> float:
        """Its wall clock, in seconds since the epoch."""
        return float(self.run("date +%s.%N"))

    def by_member(self, command: str, status: int = 0) -> str:
        """Run kvmtrace as a user of the group kvmtrace."""
        line = f"cd /home/{MEMBER} && exec runuser -u {MEMBER} -- kvmtrace {command}"
        done = self.machine.run(line, PATIENCE)
        assert done.status == status, done
        return done.stdout

    def property(self, name: str) -> str:
        """A property of the service, by systemd's name."""
        return self.run(f"systemctl show --value -p {name} kvmtrace").strip()

    def entries(self, *matches: str) -> list[dict[str, Any]]:
        """Entries of the service in the journal, oldest first."""
        found = self.run(f"journalctl -u kvmtrace -o json --all {shlex.join(matches)}")
        return [json.loads(line) for line in found.splitlines()]

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until the condition is true, and return what it returned."""
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            log = "journalctl -u kvmtrace | tail -n 30"
            assert time.monotonic() < deadline, (what, self.run(log))
            time.sleep(0.5)
        return found

    def until_restarted(self, times: int) -> None:
        """Wait until systemd has restarted the service so often, and it is ready."""

        def is_ready() -> bool:
            shown = self.run("systemctl show -p ActiveState -p NRestarts kvmtrace").split()
            return set(shown) == {"ActiveState=active", f"NRestarts={times}"}

        self.until(is_ready, f"active after {times} restarts")

    def with_poison(self, name: str) -> Vmm:
        """Start a VM that has touched a poisoned page."""
        vmm = Vmm(self.machine, name)
        create = f"create v backing={self.release.backing} pages=32"
        for step in (create, "touch v +3", "poison v +3", "touch v +3"):
            vmm.step(step)
        return vmm

    def logged(self, vmm: Vmm) -> dict[str, Any]:
        """Wait for the entry of the log about the VMM's notification, and return it."""

        def delivered() -> Any:
            of_vm = (f"MESSAGE_ID={INCIDENT_ID}", f"VM_PID={vmm.pid}", "STATE=delivered")
            return self.entries(*of_vm)

        entry, *_ = self.until(delivered, f"the log's entry about {vmm.name}")
        assert entry["VM_NAME"] == vmm.name
        return dict(entry)
