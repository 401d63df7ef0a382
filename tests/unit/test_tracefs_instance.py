"""Ownership of traces in tracefs, and the CPUs of an instance."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from kvmtrace.linux.tracefs import instance
from kvmtrace.linux.tracefs.ring_page import PageLayout


def test_our_own_name_is_alive_and_fits_a_group() -> None:
    name = instance.own_name()
    assert name.startswith(f"kvmtrace_{os.getpid()}_")
    assert name.isidentifier()
    assert len(f"{name}_signals") < 64
    assert not instance.is_dead(name)
    assert not instance.is_dead(f"{name}_poison")


def test_the_dead_are_known_by_pid_and_start() -> None:
    _, pid, start, namespace = instance.own_name().split("_")
    assert instance.is_dead(f"kvmtrace_{pid}_{int(start) + 1}_{namespace}_faults")
    assert instance.is_dead(f"kvmtrace_{2**22 + 1}_{start}_{namespace}")


@pytest.mark.parametrize(
    "name",
    ["mine", "kvmtrace", "kvmtrace_1", "kvmtrace_99999999_1_f_x_y", "xkvmtrace_99999999_1_f"],
)
def test_what_others_made_is_never_dead(name: str) -> None:
    assert not instance.is_dead(name)


def test_those_of_another_pid_namespace_cannot_be_seen_and_are_left() -> None:
    _, _, start, namespace = instance.own_name().split("_")
    assert not instance.is_dead(f"kvmtrace_4194305_{start}_{int(namespace, 16) + 1:x}")


@pytest.mark.parametrize(
    ("text", "cpus"), [("0", [0]), ("0-3", [0, 1, 2, 3]), ("0,2-3,8\n", [0, 2, 3, 8])]
)
def test_online_cpus(tmp_path: Path, text: str, cpus: list[int]) -> None:
    (tmp_path / "online").write_text(text)
    assert instance.online_cpus(str(tmp_path / "online")) == cpus


def test_more_cpus_than_descriptors_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The soft limit is raised as far as needed; CPUs that come when none is left are tried."""
    (tmp_path / "instances").mkdir()
    monkeypatch.setattr(instance.Instance, "write", lambda *_: None)
    ring = instance.Instance(str(tmp_path), "one", 4, PageLayout(8, 16, 4096))

    def has_cpus(number: int) -> None:
        for cpu in range(number):
            directory = tmp_path / "instances" / "one" / "per_cpu" / f"cpu{cpu}"
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "trace_pipe_raw").touch()
        monkeypatch.setattr(instance, "online_cpus", lambda: list(range(number)))

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, limits[1]))
        has_cpus(100)
        assert len(ring.open_cpus()) == 100
        monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
        has_cpus(4 * used + 400)
        first = len(ring.open_cpus())
        assert 0 < first < 4 * used + 300
        monkeypatch.undo()
        has_cpus(4 * used + 400)
        assert first + len(ring.open_cpus()) == 4 * used + 300
    finally:
        for fd in ring.fds():
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
