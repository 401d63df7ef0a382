"""Debian packages of any suite, fetched by apt without touching the host's configuration.

Each (suite, architecture) has its own apt directory in the cache, with lists and trust settings.
The mirror is that of the host's apt, or KVMTRACE_LAB_MIRROR. apt checks every signature against
debian-archive-keyring. Nothing is installed on the host.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

from tests.lab import cache, programs
from tests.lab.errors import LabError
from tests.lab.progress import megabytes, print_status, step
from tests.lab.resolve import Package, parse

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
FRESH = 24 * 3600
# A mirror that is no longer updated. "Not valid yet" means a wrong clock, which is an error.
EXPIRED = re.compile(r"\bis expired \(invalid since ")
UNKNOWN_KEY = re.compile(r"NO_PUBKEY|is not signed|Missing key|couldn't be verified")


def uri() -> str:
    """URI of the Debian mirror: KVMTRACE_LAB_MIRROR, or that of the host's apt."""
    chosen = os.environ.get("KVMTRACE_LAB_MIRROR")
    if chosen:
        return chosen.rstrip("/")
    wanted = "$(REPO_URI)|$(COMPONENT)|$(ORIGIN)|$(LABEL)|$(RELEASE)"
    listed = programs.output(
        ["apt-get", "indextargets", "--format", wanted, "Created-By: Packages"]
    )
    targets = [line.split("|") for line in listed.splitlines() if line.count("|") == 4]
    codename = re.search(r"^VERSION_CODENAME=(\w+)", _os_release(), re.MULTILINE)
    for address, component, origin, label, release in targets:
        own_release = codename is not None and release == codename[1] and not origin
        if component == "main" and ((origin, label) == ("Debian", "Debian") or own_release):
            return address.rstrip("/")
    raise LabError("apt is not configured with a Debian mirror: set KVMTRACE_LAB_MIRROR")


def _os_release() -> str:
    path = Path("/etc/os-release")
    return path.read_text() if path.exists() else ""


class Suite:
    """A suite of the mirror for one architecture."""

    def __init__(self, name: str, arch: str) -> None:
        self.name = name
        self.arch = arch
        self.home = cache.directory() / "apt" / f"{name}-{arch}"
        self.config = self.home / "apt.conf"
        self._updated = False

    def source(self, *, expired: bool = False) -> str:
        """The suite's line of sources.list."""
        options = f"signed-by={KEYRING}"
        if expired:
            options += " check-valid-until=no"
        return f"deb [{options}] {uri()} {self.name} main"

    @property
    def current_source(self) -> str:
        """The line in use; the package list is fetched first."""
        self.update()
        return (self.home / "etc/sources.list").read_text().strip()

    def _configure(self, source: str) -> None:
        for directory in (
            "lists/partial",
            "cache/archives/partial",
            "etc/apt.conf.d",
            "etc/trusted.gpg.d",
        ):
            (self.home / directory).mkdir(parents=True, exist_ok=True)
        (self.home / "status").touch()
        (self.home / "etc/sources.list").write_text(source + "\n")
        # Keep proxies, certificates and credentials of the host's apt, but not its policy.
        transport = [
            line
            for line in programs.output(["apt-config", "dump"]).splitlines()
            if re.match(r"Acquire::(https?|Retries|ForceIPv\d)\b", line)
        ]
        own = {
            "APT::Architecture": self.arch,
            "APT::Architectures::": self.arch,
            "APT::Sandbox::User": "root",
            "Dir::Etc": f"{self.home}/etc",
            "Dir::State::lists": f"{self.home}/lists",
            "Dir::State::status": f"{self.home}/status",
            "Dir::Cache": f"{self.home}/cache",
            "Acquire::Languages": "none",
            "Acquire::GzipIndexes": "true",
        }
        lines = [*transport, *(f'{key} "{value}";' for key, value in own.items())]
        self.config.write_text("\n".join(lines) + "\n")

    def _apt(self, *command: str, cwd: Path | None = None) -> str:
        return programs.output(command, env={"APT_CONFIG": str(self.config)}, cwd=cwd)

    def update(self) -> None:
        """Fetch the suite's package list unless it is younger than a day."""
        if self._updated:
            return
        if not KEYRING.exists():
            raise LabError(f"{KEYRING} is missing: install debian-archive-keyring")
        with cache.lock(f"apt-{self.name}-{self.arch}"):
            stamp = self.home / "updated"
            source = self.source()
            known = stamp.read_text() if stamp.exists() else ""
            if known != source or time.time() - stamp.stat().st_mtime > FRESH:
                try:
                    with step(f"package list of {self.name} ({self.arch})"):
                        self._fetch_lists(source)
                except LabError as error:
                    if known != source:
                        stamp.unlink(missing_ok=True)  # the lists are those of another mirror
                        raise
                    print_status(f"{error}; using the list of {self.name} that was fetched earlier")
                else:
                    stamp.write_text(source)
        self._updated = True

    def _fetch_lists(self, source: str) -> None:
        self._configure(source)
        command = ["apt-get", "update", "-q", "--error-on=any"]
        try:
            self._apt(*command)
        except LabError as error:
            if UNKNOWN_KEY.search(str(error)):
                raise LabError(
                    f"debian-archive-keyring has no key of {self.name}: upgrade it"
                ) from error
            if not EXPIRED.search(str(error)):
                raise
            print_status(f"{self.name}'s release file has expired; its signature is still checked")
            self._configure(self.source(expired=True))
            self._apt(*command)

    def packages(self, pattern: str) -> list[Package]:
        """List the packages whose names match a regular expression, maybe none."""
        self.update()
        with contextlib.suppress(LabError):
            return list(parse(self._apt("apt-cache", "show", pattern)))
        return []

    def download(self, names: list[str], into: Path) -> list[Path]:
        """Download and verify `names` ("package" or "package=version"); return the .deb files."""
        self.update()
        into.mkdir(parents=True, exist_ok=True)
        self._apt("apt-get", "download", "-q", *names, cwd=into)
        return sorted(into.glob("*.deb"))

    def unpack(self, names: list[str], into: Path, what: str, size: int = 0) -> None:
        """Download packages and unpack them into a directory, without installing them."""
        debs = into / ".debs"
        with step(f"{what} from {self.name}" + (f" ({megabytes(size)})" if size else "")):
            for deb in self.download(names, debs):
                programs.output(["dpkg-deb", "-x", deb, into])
                deb.unlink()
            debs.rmdir()
