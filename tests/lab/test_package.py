"""Build the Debian package, install it on Debian, and look at what is there."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest

from kvmtrace import __version__
from tests.lab import debian_package
from tests.lab.config import PROJECT
from tests.lab.conftest import needed
from tests.lab.debian_package import System

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> System:
    with needed():
        package = debian_package.built(request.param)
        system = System(request.param, tmp_path_factory.mktemp(request.param))
    shutil.copy(package, system.root / "tmp")
    shutil.copy(PROJECT / "tests/recordings/story.jsonl", system.root / "tmp")
    system.run("apt-get install -y --no-install-recommends /tmp/kvmtrace_*_all.deb")
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
    asked = """
        . /usr/share/bash-completion/completions/kvmtrace
        COMP_WORDS=(kvmtrace exp) COMP_CWORD=1
        _kvmtrace_completion kvmtrace exp kvmtrace
        echo "${COMPREPLY[@]}"
    """
    assert installed.run(f"bash -c {shlex.quote(asked)}").split() == ["explain"]


def test_dashboard_and_alerts(installed: System) -> None:
    share = installed.root / "usr/share/kvmtrace"
    for name in ("alerts.yml", "kvmtrace-host.json"):
        assert (share / name).read_text() == (PROJECT / "dashboards" / name).read_text()


def test_purged_nothing_is_left(installed: System) -> None:
    """Comes last: it takes the package away."""
    made = ("var/cache/kvmtrace", "var/lib/kvmtrace")
    for directory in made:
        installed.run(f"mkdir -p /{directory} && touch /{directory}/file")
    listed = installed.run("dpkg -L kvmtrace").split()
    installed.run("dpkg --purge kvmtrace")
    assert not [path for path in listed if (installed.root / path[1:]).is_file()]
    assert not [one for one in made if (installed.root / one).exists()]
