"""Dynamic events against a tracefs that refuses as real kernels were seen to."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmtrace.linux.tracefs import dynamic_events
from kvmtrace.linux.tracefs.dynamic_events import Defined, DefineError, DynamicEvents, Field
from kvmtrace.sources.ftrace import signals


class Kernel(DynamicEvents):
    """``refuses``: {word in a command: reason in error_log}; ``ways``: letters of known types."""

    def __init__(self, root: Path, refuses: dict[str, str], ways: str = "fpr") -> None:
        super().__init__(str(root), "kvmtrace_1_2_3")
        self.root, self.refuses, self.ways = root, refuses, ways
        self.commands: list[str] = []
        (root / "error_log").write_text(
            "[    1.000000] trace_kprobe: error: Somebody else's\n"
            "  Command: p:other/event function\n             ^\n"
        )
        (root / "dynamic_events").write_text("p:other/event function\n")

    def _write(self, command: str) -> None:
        self.commands.append(command)
        if command.startswith("-:"):
            lines = (self.root / "dynamic_events").read_text().splitlines()
            kept = [line for line in lines if command[1:] + " " not in line]
            (self.root / "dynamic_events").write_text("".join(f"{line}\n" for line in kept))
            return
        if command[0] not in self.ways:
            raise OSError(22, "Invalid argument")
        for word, reason in self.refuses.items():
            at = command.find(word)
            if at >= 0:
                with (self.root / "error_log").open("a") as log:
                    log.write(
                        f"[   15.{len(self.commands):06}] trace_fprobe: error: {reason}\n"
                        f"  Command: {command}\n{' ' * (11 + at)}^\n"
                    )
                raise OSError(22, "Invalid argument")
        with (self.root / "dynamic_events").open("a") as file:
            file.write(f"{command}\n")


WANTED = (
    Field("kvm", ("vcpu->kvm:x64",), needed=True),
    Field("tgid", ("vcpu->kvm->mm->owner->tgid",), helper=True),
    Field("gpa", ("vcpu->run->memory_fault.gpa:x64",)),
    Field("exits", ("vcpu->stat.exits", "vcpu->stat.generic.exits")),
    Field("ret", ("$retval:s32",), needed=True),
)


def test_all_fields_at_once_where_the_kernel_has_them(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, {})
    assert kernel.define("run", "ioctl_run", "return", WANTED) == Defined(
        "run", "ioctl_run", "fprobe event", ("kvm", "tgid", "gpa", "exits", "ret"), ()
    )
    assert kernel.commands == [
        "f4096:kvmtrace_1_2_3/run ioctl_run%return kvm=vcpu->kvm:x64 "
        "tgid=vcpu->kvm->mm->owner->tgid gpa=vcpu->run->memory_fault.gpa:x64 "
        "exits=vcpu->stat.exits ret=$retval:s32"
    ]


def test_a_kernel_whose_fprobes_need_no_instances(tmp_path: Path) -> None:
    """As 7.3 refuses it: at the second character."""
    kernel = Kernel(tmp_path, {"4096": "Invalid maxactive number", "exits=": "No such field"})
    defined = kernel.define("run", "ioctl_run", "return", WANTED)
    assert isinstance(defined, Defined)
    assert defined.fields == ("kvm", "tgid", "gpa", "ret")
    assert [command.partition(" ")[0] for command in kernel.commands[:2]] == [
        "f4096:kvmtrace_1_2_3/run",
        "f:kvmtrace_1_2_3/run",
    ]
    assert kernel.commands[1].partition(" ")[2] == kernel.commands[0].partition(" ")[2]
    at_entry = kernel.define("gone", "destroy_vm", "entry", WANTED[:1])
    assert isinstance(at_entry, Defined)
    assert kernel.commands[-1].startswith("f:kvmtrace_1_2_3/gone destroy_vm kvm=")


def test_a_refused_field_costs_that_fact_and_no_more(tmp_path: Path) -> None:
    kernel = Kernel(
        tmp_path,
        {
            "memory_fault": "This field is not found.",
            "vcpu->stat.exits": "This field is not found.",
            "owner->tgid": "Argument expression is too long",
        },
    )
    defined = kernel.define("run", "ioctl_run", "return", WANTED)
    assert isinstance(defined, Defined)
    assert defined.fields == ("kvm", "exits", "ret")
    assert defined.missing == (("gpa", "This field is not found."),)
    assert "exits=vcpu->stat.generic.exits" in kernel.commands[-1]


def test_a_needed_field_costs_the_probe(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, {"vcpu->kvm:x64": "This field is not found."})
    assert kernel.define("run", "ioctl_run", "return", WANTED) == DefineError(
        "ioctl_run: kvm: This field is not found."
    )


def test_a_function_that_is_not_there(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, {"vcpu->kvm:x64": "No BTF entry for this probe point"})
    assert kernel.define("run", "ioctl_run", "return", WANTED) == DefineError(
        "ioctl_run: No BTF entry for this probe point"
    )
    assert len(kernel.commands) == 1


def test_kretprobes_where_there_are_no_fprobes(tmp_path: Path) -> None:
    """Linux 6.12 on arm64: EINVAL, and no new line in error_log."""
    kernel = Kernel(tmp_path, {}, ways="pr")
    defined = kernel.define("run", "ioctl_run", "return", WANTED)
    assert isinstance(defined, Defined)
    assert defined.probe_type == "kretprobe event"
    assert kernel.commands[-1].startswith("r4096:kvmtrace_1_2_3/run ioctl_run kvm=")


def test_registers_where_there_are_no_argument_names(tmp_path: Path) -> None:
    """Linux 6.1."""
    refuses = dict.fromkeys(("=code", "=addr", "=lsb", "=t->"), "Invalid fetch argument")
    kernel = Kernel(tmp_path, refuses, ways="pr")
    lacking = kernel.define("sigbus", "send_sig_mceerr", "entry", signals.PROBES["sigbus"].fields)
    assert isinstance(lacking, DefineError)
    assert "tid" in lacking.why
    kernel._offset = lambda _struct, member: {"pid": 1256, "tgid": 1260}[member]
    defined = kernel.define("sigbus", "send_sig_mceerr", "entry", signals.PROBES["sigbus"].fields)
    assert isinstance(defined, Defined)
    assert kernel.commands[-1] == (
        "p:kvmtrace_1_2_3/sigbus send_sig_mceerr code=$arg1:s32 addr=$arg2:x64 lsb=$arg3:s16 "
        "tid=+1256($arg4):s32 tgid=+1260($arg4):s32"
    )


def test_a_refusal_that_points_nowhere_leaves_the_leanest(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, {"gpa=": "Too many operations"})
    original = kernel._refusal
    kernel._refusal = lambda command: (original(command)[0], 9999)  # type: ignore[method-assign]
    defined = kernel.define("run", "ioctl_run", "return", WANTED)
    assert isinstance(defined, Defined)
    assert defined.fields == ("kvm", "ret")
    assert {name for name, _ in defined.missing} == {"gpa", "exits"}


def test_only_ours_are_listed_and_removed(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, {})
    kernel.define("run", "ioctl_run", "return", WANTED)
    assert kernel.names() == ["run"]
    assert dynamic_events.groups(str(tmp_path)) == {"other", "kvmtrace_1_2_3"}
    assert kernel.remove("run")
    assert kernel.names() == []
    assert (tmp_path / "dynamic_events").read_text() == "p:other/event function\n"


def test_an_event_in_use_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(tmp_path, {})

    def busy(command: str) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(kernel, "_write", busy)
    assert not kernel.remove("run")
