"""Install as users do: with Debian's own Python packages, and with the lowest versions."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab import layer, programs, root, userland
from tests.lab.conftest import needed
from tests.lab.harness import PATIENCE
from tests.lab.userland import Userland, alone

pytestmark = pytest.mark.lab

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

Shell = Callable[[str], list[str]]
"""Builds the command that runs a line of shell in an environment. Its directory has ``tests``, but
not the tree's own ``kvmtrace``."""


def run(command: list[str], status: int = 0, cwd: Path | None = None) -> str:
    """Run a command, check its exit status and return its stdout."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd=cwd
    )
    assert done.returncode == status, (command[-1], done.returncode, done.stdout + done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


# -- a command of each kind, on a made-up host


def one_of_each_kind(shell: Shell, python: str) -> None:
    """Check that every command works. ``python``: the interpreter that has kvmtrace installed."""
    fake = f"{python} -m tests.unit.fake_host"
    assert "version" in run(shell("kvmtrace --version"))
    lines = run(shell(f"{fake} events --json --count 3 --source bpf")).splitlines()
    assert [json.loads(line)["kind"] for line in lines][-3:] == ["poison", "exit", "exit"]
    shown = json.loads(run(shell(f"{fake} top --once --json --source bpf")))
    assert "delivered" in [incident["state"] for incident in shown["incidents"]]
    assert "unclear " in run(shell(f"{fake} top --once --source bpf"))
    doctor = json.loads(run(shell(f"{fake} doctor --json --source bpf || true")))
    assert doctor["sources"][0]["works"] is True
    run(shell(f"{fake} record story.jsonl --force --duration 1s --source bpf"))
    assert run(shell("kvmtrace replay story.jsonl")) != ""
    assert "web-1" in run(shell("kvmtrace explain web-1 --from story.jsonl"))
    run(shell("kvmtrace bundle -o story.tar.gz --force --from story.jsonl"))
    run(shell("kvmtrace events --count 0"), status=2)
    pages = run(shell(f"{python} -c {shlex.quote(SERVED)}"))
    assert "kvmtrace_memory_fault_exits_total{" in pages
    assert "<html" in pages
    shown_on_a_terminal(shell(f"exec {fake} top --source bpf"))


SERVED = """
import re, subprocess, sys, time, urllib.request
command = [sys.executable, "-m", "tests.unit.fake_host", "serve", "--source", "bpf"]
serve = subprocess.Popen([*command, "--listen", "127.0.0.1:0"], stderr=subprocess.PIPE, text=True)
try:
    found = (re.search("http.*(?=/metrics)", line) for line in serve.stderr)
    url = next(match[0] for match in found if match)
    get = lambda path: urllib.request.urlopen(url + path).read().decode()
    # It serves from the beginning, and reads its events meanwhile.
    end = time.monotonic() + 60
    while "kvmtrace_memory_fault_exits_total{" not in (page := get("/metrics")):
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    print(page, get("/"))
    serve.terminate()
    sys.exit(serve.wait())
finally:
    serve.kill()
"""


def shown_on_a_terminal(command: list[str]) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as top:
        try:
            os.close(theirs)
            output, end = b"", time.monotonic() + PATIENCE
            while b"web-1" not in output:
                assert select.select([ours], [], [], max(0.0, end - time.monotonic()))[0], output
                output += os.read(ours, 65536)
            os.write(ours, b"q")
            while top.poll() is None:
                assert time.monotonic() < end, output
                if select.select([ours], [], [], 0.1)[0]:
                    with contextlib.suppress(OSError):  # EIO: it has ended
                        output += os.read(ours, 65536)
            assert top.returncode == 0, output
        finally:
            top.kill()
            os.close(ours)


# -- the lowest versions


def lowest() -> dict[str, str]:
    """The lower bounds in pyproject.toml: {package: version}."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [re.fullmatch(r"([\w-]+)>=([\d.]+)", one) for one in project["dependencies"]]
    assert all(found), "each dependency has a lower bound and nothing else"
    return {one[1]: one[2] for one in found if one}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layer.wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def lowest_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with kvmtrace and its dependencies' lowest versions; test tools are this venv's."""
    home = tmp_path_factory.mktemp("lowest")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin/python"
    pins = [f"{name}=={version}" for name, version in lowest().items()]
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", f"--python={python}"]
    with needed():
        programs.output([*pip, "install", "--only-binary=:all:", str(wheel), *pins])
    (site,) = home.glob("lib/python*/site-packages")
    # Comes last in sys.path; its .pth files (our editable kvmtrace) are not read.
    (site / "borrowed.pth").write_text(str(Path(pytest.__file__).parents[1]) + "\n")
    (home / "tests").symlink_to(ROOT / "tests")
    return python


def test_lowest_versions_are_those_installed(lowest_python: Path) -> None:
    for package, version in lowest().items():
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        assert run([str(lowest_python), "-c", code]).strip().startswith(version)
    code = "import kvmtrace; print(kvmtrace.__file__)"
    home = lowest_python.parents[1]
    assert run([str(lowest_python), "-c", code], cwd=home).startswith(str(home))


def test_a_command_of_each_kind_with_the_lowest_versions(lowest_python: Path) -> None:
    home = lowest_python.parents[1]

    def shell(line: str) -> list[str]:
        environment = [f"PATH={home}/bin:{os.environ['PATH']}", "TERM=xterm-256color"]
        return alone(["env", *environment, "sh", "-ec", f"cd {home}\n{line}"])

    one_of_each_kind(shell, "python")


def test_unit_tests_with_the_lowest_versions(lowest_python: Path) -> None:
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHON"))}
    command = [str(lowest_python), "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider"]
    done = subprocess.run(
        alone([*command, "tests/unit"]),
        cwd=ROOT,
        env=ours | {"KVMTRACE_LAB": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


# -- Debian, by the README's commands


def words(pattern: str) -> str:
    """Return the matching lines of the README's shell blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if re.search(pattern, line)]
    assert lines, f"the README has no shell line with {pattern}"
    return "\n".join(lines)


APT = tuple(words("^apt install").partition("#")[0].split()[2:])
WAYS = {"venv": words("/opt/kvmtrace"), "pipx": words("^pipx install")}
# Debian packages that users may have installed, and that kvmtrace has to work with.
DEBIAN = {
    "bookworm": ("python3-click", "python3-prometheus-client"),
    "trixie": ("python3-click", "python3-prometheus-client", "python3-textual"),
}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Downloads the wheels that pip needs in a Debian root, by the version of its Python."""

    @functools.cache
    def downloaded(python: str) -> Path:
        into = tmp_path_factory.mktemp("wheels")
        userland.pip_download([*userland.TOOLS, *root.dependencies()], into, python)
        return into

    return downloaded


@pytest.fixture(params=DEBIAN)
def suite(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def debian(suite: str, wheels: Callable[[str], Path], tmp_path: Path) -> Userland:
    with needed():
        made = userland.root(suite, (*APT, *DEBIAN[suite]))
        found = wheels(userland.python_of(made))
    return Userland(made, tmp_path, found)


@pytest.mark.parametrize("way", WAYS)
def test_installed_on_debian_by_the_readmes_words(debian: Userland, suite: str, way: str) -> None:
    run(debian.command(f"cd /{userland.CLONE}\n{WAYS[way]}"))
    python = run(debian.command("head -n 1 $(command -v kvmtrace)")).strip().removeprefix("#!")
    for package in DEBIAN[suite]:
        module = package.removeprefix("python3-").replace("-", "_")
        found = run(debian.command(f"{python} -c 'import {module}; print({module}.__file__)'"))
        assert found.startswith("/usr/lib/python3/"), found
    if way == "venv":  # pipx makes the same environment
        one_of_each_kind(debian.command, python)
    report = json.loads(run(debian.command("kvmtrace doctor --json"), status=1))
    (bcc,) = [check for check in report["checks"] if check["name"] == "bcc"]
    assert bcc["ok"], bcc
