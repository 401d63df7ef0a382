"""The files of ``kvmtrace assets``: written where they are wanted, and they agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmtrace.linux import privileges
from tests.lab.container import manifest
from tests.unit.command_line import invoke

FILES = {
    "unit": {"kvmtrace.service", "kvmtrace.socket", "kvmtrace.sysusers"},
    "rules": {"alerts.yml"},
    "dashboards": {"kvmtrace-host.json"},
    "scrape-config": {"scrape-config.yml"},
    "config": {"kvmtrace.toml"},
    "container": {"Containerfile", "kvmtrace-daemonset.yaml"},
}


@pytest.mark.parametrize("kind", FILES)
def test_files_are_written_once(kind: str, tmp_path: Path) -> None:
    into = tmp_path / "new"
    result = invoke("assets", kind, "--to", str(into))
    assert result.exit_code == 0
    *named, _ = result.stdout.splitlines()
    assert {Path(one).name for one in named} == FILES[kind]
    assert {path.name for path in into.iterdir()} == FILES[kind]
    again = invoke("assets", kind, "--to", str(into))
    assert again.exit_code == 1
    assert "already exists" in again.stderr
    assert invoke("assets", kind, "--to", str(into), "--force").exit_code == 0


def unit(tmp_path: Path) -> str:
    invoke("assets", "unit", "--to", str(tmp_path))
    return (tmp_path / "kvmtrace.service").read_text()


def test_unit_and_container_hold_the_capabilities_of_a_command_that_watches(
    tmp_path: Path,
) -> None:
    """SYS_ADMIN includes BPF and PERFMON. In the place of SYS_RESOURCE the unit has limits."""
    bounding = re.search(r"^CapabilityBoundingSet=(.*)$", unit(tmp_path), re.MULTILINE)
    assert bounding
    wanted = privileges.WATCHING - {"BPF", "PERFMON", "SYS_RESOURCE"}
    assert set(bounding[1].split()) == {f"CAP_{name}" for name in wanted}
    assert set(manifest().capabilities) == wanted


def test_the_container_keeps_what_the_unit_keeps(tmp_path: Path) -> None:
    text = unit(tmp_path)
    directories = re.findall(r"^(Cache|State|Runtime)Directory=(\w+)$", text, re.MULTILINE)
    where = {"Cache": "/var/cache", "State": "/var/lib", "Runtime": "/run"}
    kept = {f"{where[kind]}/{name}" for kind, name in directories}
    assert len(kept) == 3
    assert all(manifest().mounts[path] == path for path in kept)
