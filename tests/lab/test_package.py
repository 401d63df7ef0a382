"""Build the Debian package, install it on Debian, and look at what is there."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmtrace import __version__
from tests.lab import layer, userland
from tests.lab.config import PROJECT
from tests.lab.conftest import needed
from tests.lab.userland import alone

pytestmark = pytest.mark.lab

_ENTER = """
set -e
root=$1
shift
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
exec chroot "$root" env -i HOME=/root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin sh -ec "$1"
"""
# Beside what the package needs to be built: to look at the unit and the manual pages.
_BESIDE = ("build-essential", "man-db", "systemd")


def build_dependencies() -> tuple[str, ...]:
    """Names of the packages in Build-Depends."""
    text = (PROJECT / "debian/control").read_text()
    found = re.search(r"^Build-Depends:\n((?: .*\n)+)", text, re.MULTILINE)
    assert found
    names = re.findall(r"^ ([\w.+-]+)", found[1], re.MULTILINE)
    return tuple("debhelper" if name == "debhelper-compat" else name for name in names)


class System:
    """A Debian root of its own, which may be changed."""

    def __init__(self, suite: str, home: Path) -> None:
        with needed():
            made = userland.root(suite, (*build_dependencies(), *_BESIDE))
        self.root = home / "root"
        subprocess.run(["cp", "-a", "--reflink=auto", made, self.root], check=True)
        for left_out in (self.root / "etc/dpkg/dpkg.cfg.d").glob("*mmdebstrap"):
            left_out.unlink()  # manual pages are looked at here
        self.source = self.root / "build/kvmtrace"
        beside = [one for name in ("debian", "docs") for one in (PROJECT / name).rglob("*")]
        for path in (*layer.clone_files(), *filter(Path.is_file, beside)):
            copy = self.source / path.relative_to(PROJECT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy, follow_symlinks=False)
        shutil.copy(PROJECT / "tests/recordings/story.jsonl", self.root / "tmp")

    def run(self, line: str, status: int = 0) -> str:
        """Run a line of shell in it; return its stdout."""
        command = alone(["sh", "-c", _ENTER, "sh", str(self.root), line])
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, (line, done.stdout[-5000:] + done.stderr[-5000:])
        return done.stdout


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> System:
    system = System(request.param, tmp_path_factory.mktemp(request.param))
    system.run("cd /build/kvmtrace && dpkg-buildpackage -us -uc -b")
    system.run("dpkg -i /build/kvmtrace_*_all.deb")
    return system


def test_the_package_has_the_version_of_the_project() -> None:
    first = (PROJECT / "debian/changelog").read_text().splitlines()[0]
    assert first.startswith(f"kvmtrace ({__version__}) ")


def test_commands_run_with_the_distributions_libraries(installed: System) -> None:
    assert __version__ in installed.run("kvmtrace --version")
    for place in ("click", "prometheus_client", "kvmtrace"):
        found = installed.run(f"python3 -c 'import {place}; print({place}.__file__)'")
        assert found.startswith("/usr/lib/python3/dist-packages/")
    assert "web-1" in installed.run("kvmtrace replay /tmp/story.jsonl")
    assert "web-1" in installed.run("kvmtrace explain web-1 --from /tmp/story.jsonl")
    report = json.loads(installed.run("kvmtrace doctor --json", status=1))
    assert "bcc" in [check["name"] for check in report["checks"]]


def test_the_unit_is_sound_and_confined(installed: System) -> None:
    unit = installed.run("dpkg -L kvmtrace | grep '/systemd/system/kvmtrace.service$'").strip()
    installed.run(f"systemd-analyze verify --man=no {unit} 2>&1")
    said = installed.run(f"systemd-analyze security --offline=true --no-pager {unit}")
    exposure = re.search(r"Overall exposure level for kvmtrace.service: ([0-9.]+)", said)
    assert exposure
    assert float(exposure[1]) <= 3.0
    assert installed.run("systemctl is-enabled kvmtrace").strip() == "enabled"


def test_the_group_is_made(installed: System) -> None:
    assert installed.run("getent group kvmtrace")


def test_the_configuration_is_the_admins(installed: System) -> None:
    path = "/etc/kvmtrace/kvmtrace.toml"
    assert path in installed.run("dpkg-query -W -f='${Conffiles}' kvmtrace")
    assert installed.run("kvmtrace config check") == f"ok: {path}\n"


def test_manual_pages_and_completions(installed: System) -> None:
    listed = installed.run("dpkg -L kvmtrace").split()
    commands = re.findall(r"^  ([a-z]+)  ", installed.run("kvmtrace --help"), re.MULTILINE)
    assert {"top", "explain", "serve"} <= set(commands)
    for command in commands:
        assert f"/usr/share/man/man1/kvmtrace-{command}.1.gz" in listed
    assert "explain" in installed.run("MANPAGER=cat man kvmtrace")
    for shell in (
        "bash-completion/completions/kvmtrace",
        "zsh/vendor-completions/_kvmtrace",
        "fish/vendor_completions.d/kvmtrace.fish",
    ):
        assert "_KVMTRACE_COMPLETE" in (installed.root / "usr/share" / shell).read_text()


def test_dashboard_and_alerts(installed: System) -> None:
    share = installed.root / "usr/share/kvmtrace"
    for name in ("alerts.yml", "kvmtrace-host.json"):
        assert (share / name).read_text() == (PROJECT / "dashboards" / name).read_text()


def test_purged_nothing_is_left(installed: System) -> None:
    """Comes last: it takes the package away."""
    installed.run("mkdir -p /var/cache/kvmtrace && touch /var/cache/kvmtrace/programs")
    listed = installed.run("dpkg -L kvmtrace").split()
    installed.run("dpkg --purge kvmtrace")
    left = [path for path in listed if (installed.root / path[1:]).is_file()]
    with contextlib.suppress(FileNotFoundError):
        left += [str(path) for path in (installed.root / "var/cache/kvmtrace").iterdir()]
    assert left == []
