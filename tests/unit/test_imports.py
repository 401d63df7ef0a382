"""The architecture as a test: every foreign library has one home, and data flows one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvmtrace

PACKAGE = Path(kvmtrace.__file__).parent

# library: the modules that may know it, and nothing else
HOMES = {
    "bcc": ("sources/bpf/compiler.py",),
    "click": ("cli/",),
    "prometheus_client": ("views/web/metrics.py",),
    "textual": ("views/terminal/app.py",),
    "rich": ("views/terminal/app.py",),
}
# What knows where the tracing file system is.
TRACEFS_HOMES = ("linux/tracefs/",)


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    """Every imported module, also from within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "absolute imports only"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_home(module: str, homes: tuple[str, ...]) -> bool:
    # A home may grow into several modules: views/top_keys.py, sources/ftrace_format.py, cli/.
    return any(
        module == home or module.startswith((home.removesuffix(".py") + "_", home))
        for home in homes
    )


@pytest.mark.parametrize("library", HOMES)
def test_library_has_one_home(library: str) -> None:
    strangers = [
        module
        for module, tree in modules()
        if not at_home(module, HOMES[library])
        and any(name.split(".")[0] == library for name in imports(tree))
    ]
    assert not strangers


def test_tracefs_has_its_homes() -> None:
    strangers = [
        module
        for module, tree in modules()
        if not at_home(module, TRACEFS_HOMES)
        and any(
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith(("/sys/kernel/tracing", "/sys/kernel/debug/tracing"))
            for node in ast.walk(tree)
        )
    ]
    assert not strangers


@pytest.mark.parametrize(
    ("one", "other"),
    [("sources", "views"), ("linux", "views"), ("views", "sources")],
)
def test_sources_and_views_never_meet(one: str, other: str) -> None:
    for module, tree in modules():
        if module.startswith(f"{one}/"):
            assert not [name for name in imports(tree) if name.startswith(f"kvmtrace.{other}")], (
                module
            )


CORE = [f"{name}.py" for name in "events kvm model session/history views/json_output".split()]
CORE += [f"correlate/{path.name}" for path in (PACKAGE / "correlate").glob("*.py")]


@pytest.mark.parametrize("module", CORE)
def test_the_core_is_pure(module: str) -> None:
    tree = ast.parse((PACKAGE / module).read_text())
    impure = {
        "time",
        "threading",
        "socket",
        "subprocess",
        "random",
        "pathlib",
        "kvmtrace.linux.host",
    }
    assert not impure & set(imports(tree))


def test_only_the_command_line_is_above_both() -> None:
    for module, tree in modules():
        if not module.startswith("cli/") and module != "__main__.py":
            assert "kvmtrace.cli" not in set(imports(tree)), module


@pytest.mark.parametrize(
    "module",
    ["kvmtrace.cli", "kvmtrace.sources", "kvmtrace.session.session", "kvmtrace.views.event_lines"],
)
def test_what_a_small_host_need_not_have(module: str) -> None:
    """`events` and `top --once` need click only: no TUI library, no exporter, no bcc."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"textual", "rich", "prometheus_client", "bcc"} & set(done.stdout.split())


def test_importing_a_source_needs_no_bcc() -> None:
    code = "import sys, kvmtrace.sources.bpf.source; print('bcc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr
