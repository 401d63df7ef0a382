"""Why a probe is not attached, as the ftrace source reports it."""

from __future__ import annotations

import pytest

from kvmtrace.linux import kallsyms
from kvmtrace.probes import Probe, ProbeSpec
from kvmtrace.sources.ftrace.attach import Attacher

SPEC = ProbeSpec("faultin", ("new_name", "old_name"), "return", "access")


def refused(monkeypatch: pytest.MonkeyPatch, here: tuple[str, ...], said: str) -> Probe:
    symbols = kallsyms.Symbols(dict.fromkeys(here, "kvm"), False)
    monkeypatch.setattr(kallsyms, "symbols", lambda _names: symbols)
    words = [("new_name", "new_name: No BTF entry for this probe point"), ("old_name", said)]
    return Attacher("/nonexistent", "group", {})._not_attached(SPEC, words)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        # Linux 6.12 for a function that its BTF lacks, 6.1 for an argument by name, 7.3 ...
        ("old_name: No BTF entry for this probe point", "BTF does not have this function"),
        ("old_name: vcpu: Invalid fetch argument", "no arguments by name"),
        ("old_name: gfn: This field is not found.", "lack a member"),
        ("old_name: Failed to register probe event", "does not let this function be traced"),
        ("old_name: Invalid argument", "no probes of this kind"),
        ("old_name: something that is new to us", "the kernel refuses the probe"),
    ],
)
def test_the_function_that_is_there_gives_the_reason(
    monkeypatch: pytest.MonkeyPatch, said: str, why: str
) -> None:
    probe = refused(monkeypatch, ("old_name",), said)
    assert why in (probe.why or "")
    assert len(probe.why or "") <= 80
    assert probe.target == "old_name"
    assert said in (probe.detail or "")


def test_a_kernel_without_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = refused(monkeypatch, (), "old_name: Failed to register probe event")
    assert probe.why == "this kernel has no new_name, nor under another name"
    assert (probe.attached, probe.target) == (False, None)
