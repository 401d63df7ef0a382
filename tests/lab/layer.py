"""The layer over a root: kvmtrace's wheel of the current tree and the lab's VMM."""

from __future__ import annotations

import configparser
import hashlib
import importlib.util
import platform
import shutil
import sys
import zipfile
from pathlib import Path

from tests.lab import cache, image, programs
from tests.lab.config import PROJECT, Arch
from tests.lab.errors import LabError
from tests.lab.progress import print_status, step
from tests.lab.root import LIBRARY

VMM = PROJECT / "tests/lab/vmm"
SOURCES = ("kvmtrace", "bpf", "dashboards", "pyproject.toml", "README.md", "LICENSE")

LAUNCHER = """#!/usr/bin/python3
import sys
from {module} import {attribute}
sys.exit({attribute}())
"""


def vmm(arch: Arch) -> Path:
    """Path of the lab's VMM, once `make_vmm` has built it."""
    return VMM / "build" / arch.name / "vmm"


def make_vmm(arch: Arch) -> None:
    """Build the VMM if it is not up to date. For another architecture, no compiler means no VMM."""
    with cache.lock("vmm"):
        try:
            programs.output(["make", "-s", "-C", str(VMM), f"ARCH={arch.name}"])
        except LabError as error:
            if arch.qemu.endswith(platform.machine()):
                raise
            print_status(f"no vmm for {arch.name}: {error}")


def clone_files() -> list[Path]:
    """List the files that a wheel is made of."""
    found = []
    for name in SOURCES:
        path = PROJECT / name
        inside = path.rglob("*") if path.is_dir() else [path]
        found += [one for one in inside if one.is_file() and "__pycache__" not in one.parts]
    return sorted(found)


def _key(arch: Arch) -> str:
    content = hashlib.sha256()
    for path in (*clone_files(), vmm(arch), Path(__file__)):
        if path.exists():
            content.update(str(path).encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:12]


def fetch(arch: Arch) -> Path:
    """Return the layer's image for the current tree."""
    make_vmm(arch)
    home = cache.entry(f"layer-{arch.name}", _key(arch), lambda path: _build(arch, path), keep=50)
    return home / "layer.img"


def _build(arch: Arch, directory: Path) -> None:
    tree = directory / "tree"
    _fill(arch, tree)
    image.of_directory(tree, directory / "layer.img")
    shutil.rmtree(tree)


def _fill(arch: Arch, into: Path) -> None:
    commands = into / "usr/local/bin"
    library = into / LIBRARY[1:]
    commands.mkdir(parents=True)
    library.mkdir(parents=True)
    if vmm(arch).exists():
        shutil.copy(vmm(arch), commands / "vmm")
    if not (PROJECT / "pyproject.toml").exists():
        return
    with step("kvmtrace's wheel"):
        with zipfile.ZipFile(wheel(into / "wheel")) as archive:
            archive.extractall(library)
        shutil.rmtree(into / "wheel")
    for listed in library.glob("kvmtrace-*.dist-info/entry_points.txt"):
        _launchers(listed, commands)


def wheel(into: Path) -> Path:
    """Build the wheel of the tree. If hatchling is installed, pip does not fetch it."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(into)]
    command.append("--disable-pip-version-check")
    if importlib.util.find_spec("hatchling"):
        command.append("--no-build-isolation")
    programs.output([*command, str(PROJECT)])
    return next(into.glob("kvmtrace-*.whl"))


def _launchers(entry_points: Path, commands: Path) -> None:
    """Write the wheel's commands for the machine's Python."""
    parser = configparser.ConfigParser()
    parser.read(entry_points)
    if not parser.has_section("console_scripts"):
        return
    for name, target in parser.items("console_scripts"):
        module, _, attribute = target.partition(":")
        path = commands / name
        path.write_text(LAUNCHER.format(module=module, attribute=attribute))
        path.chmod(0o755)
