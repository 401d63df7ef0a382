"""Compiles the eBPF programs with bcc, in a process that ends with it.

No other module imports bcc, which brings LLVM: 100 MB that nobody gets back. The process compiles,
takes the programs apart (bytecode, places of maps) and writes them to its standard output. Nothing
is loaded; bcc makes the maps, so it needs the privilege for that.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvmtrace import data_files
from kvmtrace.errors import KvmtraceError
from kvmtrace.linux import host
from kvmtrace.sources.bpf import attach_errors
from kvmtrace.sources.bpf.copies import PLACEHOLDERS, Code

PARTS = (
    *(f"{topic}.c" for topic in "common exits signals poison hardware vms".split()),
    "lookup.bpf.c",
)
"""The C files of the programs, in bpf/: those that are attached, and the lookups."""

BCC_HINT = "apt install python3-bpfcc (Debian, Ubuntu) or dnf install python3-bcc (Fedora)"

TIMEOUT = 300.0
"""Seconds. It takes one on a host, ten under emulation."""

_PR_SET_PDEATHSIG = 1
_RINGBUF = 27  # enum bpf_map_type


@dataclass(frozen=True, slots=True)
class MapDefinition:
    """As struct bpf_map_info has it. ``type``: enum bpf_map_type."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


@dataclass(frozen=True, slots=True)
class CompiledProgram:
    """``code``: the bytecode. ``maps``: places in it (bytes) where a map's descriptor belongs."""

    code: bytes
    maps: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class CompiledPrograms:
    """All programs and maps by name. ``bcc``: the version that compiled them."""

    bcc: str
    maps: Mapping[str, MapDefinition]
    programs: Mapping[str, CompiledProgram]

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "bcc": self.bcc,
            "maps": {name: asdict(one) for name, one in self.maps.items()},
            "programs": {
                name: {"code": base64.b64encode(one.code).decode(), "maps": one.maps}
                for name, one in self.programs.items()
            },
        }

    @classmethod
    def from_object(cls, found: Any) -> CompiledPrograms:
        """From ``as_object``. Raises ValueError for anything else."""
        try:
            made = cls(
                str(found["bcc"]),
                {
                    str(name): MapDefinition(**{key: int(value) for key, value in one.items()})
                    for name, one in found["maps"].items()
                },
                {
                    str(name): CompiledProgram(
                        base64.b64decode(one["code"], validate=True),
                        tuple((int(place), str(of)) for place, of in one["maps"]),
                    )
                    for name, one in found["programs"].items()
                },
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"these are no compiled programs: {error}") from error
        for program in made.programs.values():
            size = len(program.code)
            if (
                not size
                or size % 8
                or any(
                    of not in made.maps or not 0 <= at <= size - 16 or at % 8
                    for at, of in program.maps
                )
            ):
                raise ValueError("these are no compiled programs: a map is out of place")
        return made


# -- what is compiled


def bpf_dir() -> Path:
    """The directory with the BPF programs and the stand-in kernel headers."""
    return data_files.directory("bpf")


def joined(parts: Sequence[str] = PARTS) -> str:
    """The C files ``parts`` of bpf/ as one text.

    bcc rewrites the use of maps in the main file only, so nothing that uses them can be included.
    Compiler errors name the part.
    """
    return "".join(f'#line 1 "{part}"\n{(bpf_dir() / part).read_text()}' for part in parts)


def fingerprint(cflags: Sequence[str]) -> str:
    """What the compiled programs follow from, but for bcc: sources, macros, kernel build."""
    uname = os.uname()
    directory = bpf_dir()
    taken = hashlib.sha256()
    for word in (*cflags, uname.release, uname.version, uname.machine, joined()):
        taken.update(word.encode() + b"\0")
    for path in sorted(directory.rglob("*.h")):
        taken.update(str(path.relative_to(directory)).encode() + b"\0" + path.read_bytes() + b"\0")
    return taken.hexdigest()


def bcc_version() -> str | None:
    """The version of the bcc that this Python would import; None where there is none."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        found = importlib.util.find_spec("bcc")
        if found and found.origin:
            text = Path(found.origin).with_name("version.py").read_text()
            match = re.search(r"""^__version__ *= *['"]([^'"]+)""", text, re.MULTILINE)
            return match[1] if match else None
    return None


# -- here


def compiled(cflags: Sequence[str], python: str = sys.executable) -> CompiledPrograms:
    """The programs for these macros. Raises KvmtraceError with the compiler's words."""
    directory = bpf_dir()
    request = {
        "text": joined(),
        "cflags": [f"-I{directory}", "-g0", *cflags],  # nobody reads debugging information
        "stubs": str(directory / "stubs"),
    }
    code = f"import sys; sys.path[:] = sys.argv[1:]; from {__name__} import main; main()"
    try:
        done = subprocess.run(
            [python, "-S", "-c", code, *filter(None, sys.path)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=TIMEOUT,
            start_new_session=True,  # the terminal's Ctrl-C is not for it
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _cannot_compile(str(error)) from error
    try:
        answer = json.loads(done.stdout)
        if "error" in answer:
            raise KvmtraceError(*map(str, answer["error"]))
        return CompiledPrograms.from_object(answer)
    except (ValueError, TypeError) as error:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise _cannot_compile(words[-1] if words else f"it ended with {done.returncode}") from error


def _cannot_compile(detail: str) -> KvmtraceError:
    return KvmtraceError(
        "bcc cannot compile the eBPF programs",
        "`kvmtrace doctor --verbose` shows what it says",
        detail,
    )


# -- there


def main() -> None:
    """Answer one request on stdin with the programs, or with the words of a KvmtraceError."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    request = json.load(sys.stdin)
    answer = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is not the answer
    try:
        found: dict[str, Any] = _compile(request).as_object()
    except KvmtraceError as error:
        found = {"error": (error.message, error.hint, error.detail)}
    with open(answer, "w") as file:
        json.dump(found, file)


def import_bcc() -> Any:
    """The distribution's ``bcc`` module; raises KvmtraceError naming its package."""
    try:
        import bcc  # noqa: PLC0415
    except ImportError as error:
        # Debian's package is for its own Python, which a virtual environment may not look at.
        if error.name not in ("bcc", None):
            raise KvmtraceError("bcc does not load", BCC_HINT, str(error)) from error
        found = host.bcc_not_found()
        raise KvmtraceError(f"bcc is {found.why}", found.fix) from error
    except OSError as error:
        raise KvmtraceError("bcc does not load", BCC_HINT, str(error)) from error
    if not hasattr(bcc, "BPF"):
        raise KvmtraceError(
            "the installed bcc is PyPI's, which is another project (lattices, not BPF)",
            f"pip uninstall bcc, then {BCC_HINT}",
        )
    return bcc


def _compile(request: Mapping[str, Any]) -> CompiledPrograms:
    bcc = import_bcc()
    # On construction bcc would attach all programs by their names.
    unattached = type("BPF", (bcc.BPF,), {"_trace_autoload": lambda self: None})
    os.environ["BCC_KERNEL_SOURCE"] = request["stubs"]
    reason = ""
    with _quiet_stderr() as stderr:
        try:
            made = unattached(text=request["text"].encode(), cflags=request["cflags"])
        except Exception as error:  # bcc raises bare Exception
            reason = str(error)
    if not reason:
        return _taken_apart(bcc, made)
    detail = next((line.strip() for line in stderr if "error" in line), None) or reason
    if attach_errors.errno_in(detail) in (errno.EPERM, errno.EACCES):
        raise KvmtraceError(
            "the kernel does not permit BPF",
            "a missing capability or this host's policy: see `kvmtrace doctor`",
            detail,
        )
    raise _cannot_compile(detail)


def _taken_apart(bcc: Any, made: Any) -> CompiledPrograms:
    maps, names = _maps_of(bcc.libbcc.lib, made.module)
    lib, module = bcc.libbcc.lib, made.module
    programs: dict[str, CompiledProgram] = {}
    for number in range(lib.bpf_num_functions(module)):
        function = lib.bpf_function_name(module, number)
        start = lib.bpf_function_start(module, function)
        memory = bytearray(ctypes.string_at(start, lib.bpf_function_size(module, function)))
        code, name = Code(memoryview(memory)), function.decode()
        if strange := code.placeholders() - set(PLACEHOLDERS.values()):
            raise _cannot_compile(f"{name}: {strange.pop():#x} was made of a placeholder")
        places = tuple((at, names[descriptor]) for at, descriptor in code.map_places())
        for at, _ in places:
            code.set_map(at, 0)
        programs[name] = CompiledProgram(bytes(memory), places)
    return CompiledPrograms(bcc_version() or "unknown", maps, programs)


def _maps_of(lib: Any, module: int) -> tuple[dict[str, MapDefinition], dict[int, str]]:
    """Definitions by name, and names by the descriptors that stand in the programs."""
    # Not all of these are declared by every version of the module bcc.
    arguments = [ctypes.c_void_p, ctypes.c_size_t]
    kinds = {"name": ctypes.c_char_p, "fd_id": ctypes.c_int, "type_id": ctypes.c_int}
    kinds |= {"flags_id": ctypes.c_int, "key_size_id": ctypes.c_size_t}
    kinds |= {"leaf_size_id": ctypes.c_size_t, "max_entries_id": ctypes.c_size_t}
    for word, kind in kinds.items():
        function = getattr(lib, f"bpf_table_{word}")
        function.argtypes, function.restype = arguments, kind
    maps, names = {}, {}
    for number in range(lib.bpf_num_tables(module)):
        name = lib.bpf_table_name(module, number).decode()
        names[lib.bpf_table_fd_id(module, number)] = name
        kind = lib.bpf_table_type_id(module, number)
        maps[name] = MapDefinition(
            kind,
            # A ring buffer has neither, whatever bcc says of it.
            0 if kind == _RINGBUF else lib.bpf_table_key_size_id(module, number),
            0 if kind == _RINGBUF else lib.bpf_table_leaf_size_id(module, number),
            lib.bpf_table_max_entries_id(module, number),
            lib.bpf_table_flags_id(module, number),
        )
    return maps, names


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[list[str]]:
    """Catch what libbcc, libbpf and clang write to file descriptor 2; the list gets the lines."""
    lines: list[str] = []
    caught = os.memfd_create("stderr")
    saved = os.dup(2)
    os.dup2(caught, 2)
    try:
        yield lines
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        with open(caught, "rb") as file:
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


if __name__ == "__main__":
    main()
