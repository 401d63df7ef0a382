"""Which source `--source auto` takes."""

from __future__ import annotations

import pytest

from kvmtrace import sources
from kvmtrace.errors import KvmtraceError
from kvmtrace.linux import host
from kvmtrace.probes import NO_KVM, Probe, specs
from tests.unit.fake import FakeSource


def test_auto_takes_bpf(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opener(monkeypatch)
    source = sources.open_source("auto")
    assert (opened, source.why) == (["bpf"], "bpf works here")


def test_auto_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opener(monkeypatch, bpf=KvmtraceError("bcc is not installed"))
    source = sources.open_source("auto")
    assert opened == ["bpf", "ftrace"]
    assert source.why == "bpf does not work here: bcc is not installed"


def test_auto_with_nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    opener(monkeypatch, bpf=KvmtraceError("no bcc"), ftrace=OSError(1, "Operation not permitted"))
    with pytest.raises(KvmtraceError, match=r"bpf: no bcc; ftrace: .*not permitted") as caught:
        sources.open_source("auto")
    assert caught.value.hint


def test_a_source_asked_for_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opener(monkeypatch, bpf=KvmtraceError("no bcc", "install it"))
    with pytest.raises(KvmtraceError, match=r"^no bcc$"):
        sources.open_source("bpf")
    assert opened == ["bpf"]


def probes_but(*missing: str) -> tuple[Probe, ...]:
    """All probes, attached but for these, which the kernel has and refuses."""
    return tuple(
        Probe(spec.name, spec.name not in missing, spec.targets[0]) for spec in specs("x86_64")
    )


@pytest.mark.parametrize(
    ("bpf", "ftrace", "chosen", "why"),
    [
        # Three probes of many, on a kernel without kprobes: not what a watch is for.
        (
            ("run", "gmem", "faultin", "vm_new", "vm_gone"),
            (),
            "ftrace",
            "bpf does not see run, gmem, faultin and 2 more here",
        ),
        (("run",), ("gmem", "faultin", "mce"), "ftrace", "; without gmem, faultin, mce"),
        (("gmem", "faultin", "mce"), ("run",), "bpf", "bpf works here, without gmem, faultin, mce"),
        (("poison", "mce"), ("gmem",), "ftrace", "bpf does not see poison, mce here"),
        (("run",), ("run",), "bpf", "bpf sees most here, but not run"),
        (("mce",), ("mce", "vm_new"), "bpf", "bpf works here, without mce"),
        (("run", "mce"), ("run",), "ftrace", "bpf does not see mce here; without run"),
    ],
)
def test_auto_takes_what_sees_more(
    monkeypatch: pytest.MonkeyPatch,
    bpf: tuple[str, ...],
    ftrace: tuple[str, ...],
    chosen: str,
    why: str,
) -> None:
    made: dict[str, FakeSource] = {}

    def opened(kind: str) -> FakeSource:
        made[kind] = FakeSource()
        made[kind].name = kind
        states = probes_but(*(bpf if kind == "bpf" else ftrace))
        monkeypatch.setattr(made[kind], "probes", lambda: states)
        return made[kind]

    monkeypatch.setattr(host, "privilege", lambda: host.Privilege(0, (1 << 41) - 1))
    monkeypatch.setattr(sources, "_open", opened)
    source = sources.open_source("auto")
    assert source.name == chosen
    assert why in (source.why or "")
    # Both were looked at, and one of them is left.
    assert {kind: one.closed for kind, one in made.items()} == {
        "bpf": int(chosen != "bpf"),
        "ftrace": int(chosen != "ftrace"),
    }


def test_auto_does_not_look_further_for_what_no_source_can_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """kvm is not loaded, or the kernel has no such function."""
    states = (
        Probe("run", False, why=NO_KVM),
        Probe("gmem", False, why="this kernel has no kvm_gmem_get_pfn"),
    )
    opened = opener(monkeypatch)
    monkeypatch.setattr(FakeSource, "probes", lambda _: states)
    source = sources.open_source("auto")
    assert (opened, source.why) == (["bpf"], "bpf works here")


def test_auto_keeps_bpf_where_nothing_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opener(monkeypatch, ftrace=KvmtraceError("tracefs is not mounted"))
    monkeypatch.setattr(FakeSource, "probes", lambda _: probes_but("run"))
    source = sources.open_source("auto")
    assert (opened, source.why) == (["bpf", "ftrace"], "bpf sees most here, but not run")


def opener(monkeypatch: pytest.MonkeyPatch, **failures: Exception) -> list[str]:
    opened: list[str] = []

    def fake_open(kind: str) -> FakeSource:
        opened.append(kind)
        if kind in failures:
            raise failures[kind]
        return FakeSource()

    monkeypatch.setattr(host, "privilege", lambda: host.Privilege(0, (1 << 41) - 1))
    monkeypatch.setattr(sources, "_open", fake_open)
    return opened
