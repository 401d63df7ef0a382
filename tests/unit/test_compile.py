"""``kvmtrace compile``: the programs for this kernel, ahead of the first start."""

from __future__ import annotations

import pytest

from kvmtrace.linux import host
from kvmtrace.sources.bpf import programs
from kvmtrace.sources.bpf.programs import Kept
from tests.unit.command_line import invoke

COLD, WARM = Kept("/kept", None, None), Kept("/kept", "0.31.0", None)
FULL = Kept("/kept", None, "/kept: No space left on device")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "privilege", lambda: host.Privilege(0, (1 << 41) - 1))
    monkeypatch.setattr(host, "kvm", lambda: host.Kvm(True, "kvm_intel", True, 1))


@pytest.mark.parametrize(
    ("before", "after", "said", "status"),
    [
        (COLD, WARM, "are kept in /kept (bcc 0.31.0)", 0),
        (None, WARM, "are kept in /kept (bcc 0.31.0)", 0),
        (WARM, None, "were kept already in /kept", 0),
        (COLD, FULL, "cannot be kept: /kept: No space left on device", 1),
    ],
)
def test_what_it_says(
    monkeypatch: pytest.MonkeyPatch,
    before: Kept | None,
    after: Kept | None,
    said: str,
    status: int,
) -> None:
    monkeypatch.setattr(programs, "kept", lambda: before)
    monkeypatch.setattr(programs, "keep", lambda: after)
    result = invoke("compile")
    assert said in (result.stderr if status else result.stdout)
    assert result.exit_code == status


def test_without_kvm_there_is_nothing_to_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "kvm", lambda: host.Kvm(False, None, False, None))
    result = invoke("compile")
    assert result.exit_code == 1
    assert "kvm is not loaded" in result.stderr
    assert "modprobe" in result.stderr


def test_it_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "privilege", lambda: host.Privilege(1000, 0))
    result = invoke("compile")
    assert result.exit_code == 1
    assert "root" in result.stderr
