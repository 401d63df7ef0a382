"""The architecture as a test: imports go down the layers, and every library has one home."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kvmtrace

PACKAGE = Path(kvmtrace.__file__).parent

# A layer is a package, and the modules beside the packages are the vocabulary. From the bottom to
# the top: what each may import besides itself. A module here stands for that module only.
VOCABULARY = "vocabulary"
MAY_IMPORT = {
    VOCABULARY: (),
    "linux": (VOCABULARY,),
    "vmm": (VOCABULARY, "linux"),
    "sources": (VOCABULARY, "linux", "vmm"),
    "enrich": (VOCABULARY, "linux", "vmm", "sources"),
    # Pure: a decoder is all that it takes from below.
    "correlate": (VOCABULARY, "linux/mce.py"),
    "session": (VOCABULARY, "linux", "sources", "enrich", "correlate"),
    # Snapshots are all that it judges by.
    "judgement": (VOCABULARY,),
    # Snapshots, and what is judged of them, are all that they draw from.
    "views": (VOCABULARY, "linux", "vmm/command_line.py", "judgement"),
    "cli": (
        *(VOCABULARY, "linux", "vmm", "sources", "enrich", "correlate", "session"),
        *("judgement", "views"),
    ),
}
# library: where it may be imported, and nowhere else
HOMES: dict[str, str | tuple[str, ...]] = {
    "bcc": "sources/bpf/compiler.py",
    "click": "cli/",
    "h11": "views/web/server.py",
    "yaml": "views/web/web_config.py",
    "bcrypt": "views/web/basic_auth.py",
    "prometheus_client": (
        *("views/web/metrics.py", "views/web/history_metrics.py"),
        "views/web/exposition.py",
    ),
    "textual": "views/terminal/app.py",
    "rich": "views/terminal/app.py",
}
# What knows where the tracing file system is.
TRACEFS_HOMES = ("linux/tracefs/",)


@functools.cache
def modules() -> dict[str, ast.Module]:
    """{path in the package: its tree}."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(tree: ast.Module) -> Iterator[str]:
    """Every imported name, also from within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "absolute imports only"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str | None:
    """The path of the module that an imported name is, or is in; None for other packages."""
    while name.split(".", maxsplit=1)[0] == "kvmtrace":
        path = "/".join(name.split(".")[1:])
        for candidate in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
            if candidate in modules():
                return candidate
        name = name.rpartition(".")[0]
    return None


@functools.cache
def graph() -> dict[str, set[str]]:
    """{module: modules of kvmtrace that it imports}, as paths."""
    return {
        module: {found for name in imports(tree) if (found := module_of(name))} - {module}
        for module, tree in modules().items()
    }


def layer(module: str) -> str:
    if module == "__main__.py":
        return "cli"
    return module.split("/", maxsplit=1)[0] if "/" in module else VOCABULARY


def test_every_package_has_its_layer() -> None:
    assert {layer(module) for module in modules()} == set(MAY_IMPORT)


def test_imports_go_down() -> None:
    wrong = {
        (module, imported)
        for module, found in graph().items()
        for imported in found
        if not {layer(imported), imported} & {layer(module), *MAY_IMPORT[layer(module)]}
    }
    assert not wrong


def test_the_table_has_no_way_up() -> None:
    below: set[str] = set()
    for name, allowed in MAY_IMPORT.items():
        assert {one.split("/")[0] for one in allowed} <= below
        below.add(name)


def test_imports_have_no_cycle() -> None:
    TopologicalSorter(graph()).prepare()  # raises CycleError with the modules


@pytest.mark.parametrize("library", HOMES)
def test_library_has_one_home(library: str) -> None:
    users = {
        module
        for module, tree in modules().items()
        if any(name.split(".")[0] == library for name in imports(tree))
    }
    assert users
    assert all(user.startswith(HOMES[library]) for user in users), users


def test_tracefs_has_its_homes() -> None:
    strangers = [
        module
        for module, tree in modules().items()
        if not module.startswith(TRACEFS_HOMES)
        and any(
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith(("/sys/kernel/tracing", "/sys/kernel/debug/tracing"))
            for node in ast.walk(tree)
        )
    ]
    assert not strangers


CORE = [f"{name}.py" for name in "events kvm model facts session/history views/json_output".split()]
CORE += [
    f"{layer}/{path.name}"
    for layer in ("correlate", "judgement")
    for path in (PACKAGE / layer).glob("*.py")
]


@pytest.mark.parametrize("module", CORE)
def test_the_core_is_pure(module: str) -> None:
    assert "linux/host.py" not in graph()[module]
    impure = {"time", "threading", "socket", "subprocess", "random", "pathlib"}
    assert not impure & {name.split(".")[0] for name in imports(modules()[module])}


@pytest.mark.parametrize(
    "module",
    [
        "kvmtrace.cli.events",
        "kvmtrace.cli.top",
        "kvmtrace.sources",
        "kvmtrace.session.session",
        "kvmtrace.views.event_lines",
    ],
)
def test_what_a_small_host_need_not_have(module: str) -> None:
    """`events` and `top --once` need click only: no TUI library, no exporter, no bcc."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"textual", "rich", "prometheus_client", "bcc"} & set(done.stdout.split())


def test_a_command_is_run_without_the_modules_of_others() -> None:
    code = (
        "import sys; from kvmtrace.cli import cli; "
        "cli.main(['events', '-h'], standalone_mode=False); "
        "print(*(one for one in cli.examples if f'kvmtrace.cli.{one}' in sys.modules))"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed.splitlines()[-1] == "events"


def test_importing_a_source_needs_no_bcc() -> None:
    code = "import sys, kvmtrace.sources.bpf.source; print('bcc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


def test_no_class_name_is_used_twice() -> None:
    names = Counter(
        node.name
        for tree in modules().values()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []
