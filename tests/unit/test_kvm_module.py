"""Whether kvm is being loaded or unloaded."""

from __future__ import annotations

import os

import pytest

from kvmtrace.linux import kvm_module


def test_a_module_with_symbols_and_without_a_directory_is_being_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    present: set[str] = set()
    live: set[str] = set()
    monkeypatch.setattr(os.path, "exists", lambda path: path.rpartition("/")[2] in present)
    monkeypatch.setattr(kvm_module, "_is_live", live.__contains__)
    assert not kvm_module.is_changing()
    assert not kvm_module.is_changing({"xfs"})
    assert kvm_module.is_changing({"kvm"})
    present.add("kvm")
    assert kvm_module.is_changing({"kvm"})
    live.add("kvm")
    assert not kvm_module.is_changing({"kvm"})
    assert kvm_module.is_changing({"kvm", "kvm_amd"})
