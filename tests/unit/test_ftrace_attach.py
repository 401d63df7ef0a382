"""Attaching to what a tracefs has, and filters that it takes or refuses."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvmtrace.probes import POISON_EVENTS, Probe
from kvmtrace.sources.ftrace.attach import RINGS, Attacher

FORMAT = """name: {name}
ID: {id}
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:unsigned long pfn;\toffset:8;\tsize:8;\tsigned:0;

print fmt: "pfn %#lx", REC->pfn
"""


class Ring:
    """An instance of which every filter is refused that has more than ``limit`` characters."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.limit = 4095
        self.errno = errno.EINVAL

    def read(self, file: str) -> str:
        path = self.path / file
        return path.read_text() if path.exists() else ""

    def write(self, file: str, text: str) -> None:
        if len(text) > self.limit:
            raise OSError(self.errno, os.strerror(self.errno))
        with (self.path / file).open("r+") as existing:
            existing.truncate()
            existing.write(text)

    append = write


def attacher(root: Path, *events: str) -> tuple[Attacher, Ring]:
    """One in a tracefs that has these tracepoints."""
    for number, event in enumerate(events):
        path = root / "instances" / "one" / "events" / event.replace(":", "/")
        path.mkdir(parents=True)
        (path / "format").write_text(FORMAT.format(name=path.name, id=number + 500))
        for file in ("enable", "filter", "trigger"):
            (path / file).write_text("")
    for file in ("dynamic_events", "kprobe_events"):
        (root / file).write_text("")
    ring = Ring(root / "instances" / "one")
    made = Attacher(str(root), "group", dict.fromkeys(RINGS, ring))  # type: ignore[arg-type]
    made.attach(False)
    return made, ring


def state(made: Attacher, name: str) -> Probe:
    return next(probe for probe in made.probes() if probe.name == name)


@pytest.mark.parametrize("event", POISON_EVENTS)
def test_the_poison_event_in_either_system(tmp_path: Path, event: str) -> None:
    made, ring = attacher(tmp_path, event)
    assert state(made, "poison") == Probe("poison", True, event, "tracepoint")
    assert ring.read(f"events/{event.replace(':', '/')}/enable") == "1"
    assert made.formats[500][0] == "poison"


def test_of_two_the_first_is_taken(tmp_path: Path) -> None:
    made, ring = attacher(tmp_path, *POISON_EVENTS)
    assert state(made, "poison").target == POISON_EVENTS[0]
    assert ring.read(f"events/{POISON_EVENTS[1].replace(':', '/')}/enable") == ""


def test_without_a_target_the_reason_names_the_first(tmp_path: Path) -> None:
    made, _ = attacher(tmp_path)
    probe = state(made, "poison")
    assert (probe.attached, probe.target) == (False, None)
    assert probe.why == f"this kernel has no {POISON_EVENTS[0]}, nor under another name"


def test_a_filter_that_is_refused_mutes_nothing(tmp_path: Path) -> None:
    made, ring = attacher(tmp_path, "kvm:kvm_userspace_exit")
    path = "events/kvm/kvm_userspace_exit/filter"
    ordinary = ring.read(path)
    assert ordinary
    assert made.mute({"run_under_way": " && !(errno < 0)", "run": " && !(ret == -14)"})
    assert ring.read(path) == f"({ordinary}) && !(errno < 0)"
    # What stands there would go on muting.
    ring.limit = len(ordinary)
    assert made.mute({"run_under_way": " && !(errno == -133)"}) is False
    assert ring.read(path) == ordinary


def test_a_filter_that_cannot_be_written_now_is_written_again(tmp_path: Path) -> None:
    """No file descriptors left: that says nothing of the filter."""
    made, ring = attacher(tmp_path, "kvm:kvm_userspace_exit")
    ring.errno = errno.EMFILE
    ring.limit = 0
    assert made.mute({"run_under_way": " && !(errno < 0)"}) is None
    ring.limit = 4095
    assert made.mute({"run_under_way": " && !(errno < 0)"}) is True


def with_kvm(
    root: Path, monkeypatch: pytest.MonkeyPatch, *, sifts: bool, machine: str = "x86_64"
) -> tuple[Probe, list[str]]:
    """The state of ``run`` where every probe is accepted; its commands."""
    monkeypatch.setattr(Attacher, "_offset", lambda *_: 8 if sifts else None)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))
    made, ring = attacher(root)
    path = ring.path / "events" / "group" / "run"
    path.mkdir(parents=True)
    (path / "format").write_text(FORMAT.format(name="run", id=700))
    for file in ("enable", "filter", "trigger"):
        (path / file).write_text("")
    made.attach(True)
    assert ring.read("events/group/run/enable") == "1"
    assert made.formats[700][0] == "run"
    assert made.counted("run")
    commands = (root / "dynamic_events").read_text().splitlines()
    return state(made, "run"), [one for one in commands if re.search(r"\S*run [kg]", one)]


@pytest.mark.parametrize(
    ("machine", "private"),
    [("x86_64", "has_private=+8(+8($vcpu)):u8"), ("aarch64", "has_private=\\0:u8")],
)
def test_what_matters_of_a_return_is_fetched_if_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, private: str
) -> None:
    probe, (every, run) = with_kvm(tmp_path, monkeypatch, sifts=True, machine=machine)
    assert probe == Probe("run", True, "kvm_arch_vcpu_ioctl_run", "fprobe event")
    assert every == (
        "f4096:group/every_run kvm_arch_vcpu_ioctl_run%return"
        " vcpu=vcpu:x64 pending=$current->pending.signal.sig:x64 ret=$retval:s32"
    )
    head, _, condition = run.partition(" if ")
    assert head.startswith("e:group/run group.every_run vcpu=$vcpu:x64 kvm=+8($vcpu):x64 ")
    assert {"reason=+8(+8($vcpu)):u32", "pending=$pending:x64", private} <= set(head.split())
    assert condition == "ret < 0 && ret != -11 && (ret != -4 || pending & 0x40)"


def test_without_offsets_all_is_fetched_at_each_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, commands = with_kvm(tmp_path, monkeypatch, sifts=False)
    assert (probe.target, probe.via) == ("kvm_arch_vcpu_ioctl_run", "fprobe event")
    assert commands[0].startswith("f4096:group/every_run ")
    assert commands[-1].startswith("f4096:group/run ")
    assert "reason=vcpu->run->exit_reason:u32" in commands[-1].split()
