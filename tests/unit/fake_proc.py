"""Made-up processes: directories in the form of /proc."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kvmtrace.vmm.identity import Identity, identify

LIBVIRT = r"0::/machine.slice/machine-qemu\x2d1\x2dfoo.scope/libvirt/emulator"


class Proc:
    """A /proc of made-up processes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(
        self,
        pid: int,
        *argv: str,
        exe: str | None = None,
        comm: str = "",
        cgroup: str = "0::/",
        fds: tuple[str, ...] = (),
    ) -> None:
        directory = self.root / str(pid)
        (directory / "fd").mkdir(parents=True)
        (directory / "cmdline").write_text("\0".join(argv) + "\0" if argv else "")
        (directory / "comm").write_text(comm + "\n")
        (directory / "cgroup").write_text(cgroup + "\n")
        if exe:
            (directory / "exe").symlink_to(exe)
        for number, target in enumerate(fds):
            (directory / "fd" / str(number)).symlink_to(target)

    def identify(self, pid: int = 1) -> Identity:
        """Its names; ``run_by`` has the rest."""
        return replace(identify(pid, str(self.root)), unit=None, api_socket=None)

    def run_by(self, pid: int = 1) -> tuple[str | None, str | None]:
        """The unit and the API's socket."""
        found = identify(pid, str(self.root))
        return found.unit, found.api_socket


UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"


SANDBOX = "7c1e0f5b9a3d4e62b8f0d1a2c3e4f5067c1e0f5b9a3d4e62b8f0d1a2c3e4f506"
QEMU = "/usr/bin/qemu-system-x86_64"
