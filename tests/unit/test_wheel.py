"""The wheel, installed where the tree cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import kvmtrace

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel by the build backend itself; nothing is downloaded."""
    out = tmp_path_factory.mktemp("wheel")
    code = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    run([sys.executable, "-c", code, str(out)], cwd=ROOT)
    (built,) = out.glob("kvmtrace-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; its dependencies are those of ours."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False, symlinks=True)
    (site,) = home.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Ours has an editable kvmtrace, by a .pth file: those are not read from a borrowed directory.
    (site / "borrowed.pth").write_text(str(Path(os.path.dirname(pytest.__file__)).parent) + "\n")
    return home


def run(
    command: list[str], cwd: Path, status: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=plain | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def python(installed: Path, code: str) -> str:
    return run([str(installed / "bin" / "python"), "-c", code], cwd=installed).stdout.strip()


def test_tree_is_out_of_reach(installed: Path) -> None:
    where = python(installed, "import kvmtrace; print(kvmtrace.__file__)")
    assert where.startswith(str(installed))


def test_version(installed: Path) -> None:
    code = "from kvmtrace.cli import main; main()"
    done = run([str(installed / "bin" / "python"), "-c", code, "--version"], cwd=installed)
    assert done.stdout == f"kvmtrace, version {kvmtrace.__version__}\n"


def test_entry_point(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        assert "kvmtrace = kvmtrace.cli:main" in archive.read(name).decode()


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_bcc_is_no_dependency(wheel: Path) -> None:
    required = [one.split()[0].lower() for one in metadata(wheel).get_all("Requires-Dist", [])]
    assert required
    assert not [requirement for requirement in required if requirement.startswith("bcc")]


def test_metadata_is_whole(wheel: Path) -> None:
    found = metadata(wheel)
    assert found["Version"] == kvmtrace.__version__
    assert found["License-Expression"] == "MIT"
    assert found["License-File"] == "LICENSE"
    for name in ("Summary", "Author", "Keywords", "Requires-Python"):
        assert found[name]
    assert found["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in found.get_all("Classifier", [])
    assert str(found.get_payload()).startswith("# kvmtrace")


def test_type_checkers_may_read_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert "kvmtrace/py.typed" in archive.namelist()


def test_the_sdist_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    """Of a sdist no git tells which files belong to it."""
    code = "import sys; from hatchling.build import build_sdist; build_sdist(sys.argv[1])"
    run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    (sdist,) = tmp_path.glob("kvmtrace-*.tar.gz")
    run(["tar", "-xf", sdist.name], cwd=tmp_path)
    code = code.replace("sdist", "wheel")
    run([sys.executable, "-c", code, ".."], cwd=tmp_path / sdist.name.removesuffix(".tar.gz"))
    (built,) = tmp_path.glob("kvmtrace-*.whl")
    with zipfile.ZipFile(built) as ours, zipfile.ZipFile(wheel) as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())


@pytest.mark.parametrize("what", ["bpf", "dashboards", "kvmtrace/assets"])
def test_data_files_are_in_it_and_found(installed: Path, what: str) -> None:
    code = {
        "bpf": "from kvmtrace.sources.bpf import compiler; print(compiler.bpf_dir())",
        "dashboards": "import kvmtrace; print(kvmtrace.__path__[0] + '/dashboards')",
        "kvmtrace/assets": "from kvmtrace import data_files; print(data_files.directory('assets'))",
    }
    found = Path(python(installed, code[what]))
    assert found.is_relative_to(installed)
    ours = {p.relative_to(ROOT / what) for p in tracked(what)}
    theirs = {p.relative_to(found) for p in found.rglob("*") if p.is_file()}
    assert ours <= theirs
    assert not [path for path in theirs if path.suffix in (".pyc", ".o")]


def tracked(what: str) -> list[Path]:
    """Tracked files of the tree; all files if there is no git."""
    done = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", what], capture_output=True, text=True, check=False
    )
    names = [name for name in done.stdout.split("\0") if name]
    return [ROOT / n for n in names] or [p for p in (ROOT / what).rglob("*") if p.is_file()]


def test_commands_that_need_nothing_work(installed: Path) -> None:
    kvmtrace_ = [str(installed / "bin" / "python"), "-m", "kvmtrace"]
    run([*kvmtrace_, "--help"], cwd=installed)
    done = run([*kvmtrace_, "replay", "/nonexistent"], cwd=installed, status=1)
    assert done.stderr.startswith("kvmtrace: /nonexistent: No such file")
    done = run([*kvmtrace_, "top"], cwd=installed, status=2)
    assert "needs a terminal" in done.stderr
