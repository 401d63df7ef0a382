"""Doctor's verdicts over made-up hosts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from kvmtrace import __version__, sources
from kvmtrace.errors import KvmtraceError
from kvmtrace.linux import host, kallsyms
from kvmtrace.linux.tracefs import mount
from kvmtrace.probes import Probe, specs
from kvmtrace.source_choice import Attempt
from kvmtrace.views import doctor, doctor_host
from kvmtrace.views.doctor_report import Check, Report, as_object, render
from tests.unit.command_line import invoke
from tests.unit.fake import FakeSource

HEALTHY = host.Facts(
    kernel="6.18.15",
    machine="x86_64",
    privilege=host.Privilege(0, (1 << 41) - 1),
    lockdown="none",
    kvm=host.Kvm(True, "kvm_amd", True, 1),
    types=host.Types(True, True, True),
    tracefs=mount.Tracefs("/sys/kernel/tracing", True, True, True),
    symbols=kallsyms.Symbols({"kvm_arch_vcpu_ioctl_run": "kvm"}, False),
    poison_names=True,
    bcc=host.Bcc("0.31.0"),
)
ALL = tuple(Probe(spec.name, True, spec.targets[0], "fexit") for spec in specs("x86_64"))
NO_RUN = tuple(dataclasses.replace(p, attached=p.name != "run", why="no BTF") for p in ALL)
BPF, FTRACE = Attempt("bpf", ALL), Attempt("ftrace", ALL)
REFUSED = Attempt("bpf", refused="bcc is not installed", hint="apt install python3-bpfcc")


def facts(**changes: Any) -> host.Facts:
    return dataclasses.replace(HEALTHY, **changes)


def check(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def test_healthy() -> None:
    report = doctor.judge(HEALTHY, [BPF, FTRACE])
    assert report.ok
    assert report.verdict == "memory-fault exits can be seen here, by bpf"
    assert all(check.ok for check in report.checks)
    assert check(report, "--source auto").found == "bpf (bpf works here)"
    assert "NO" not in render(report)


def test_one_source_is_enough() -> None:
    report = doctor.judge(
        facts(bcc=host.Bcc(None, "not installed", "apt install x")), [REFUSED, FTRACE]
    )
    assert report.ok
    assert report.verdict.endswith("by ftrace")
    assert check(report, "source bpf").ok is None
    chosen = "ftrace (bpf does not work here: bcc is not installed)"
    assert check(report, "--source auto").found == chosen
    assert check(report, "probe run").found == "kvm_arch_vcpu_ioctl_run (fexit)"


def test_the_choice_of_auto_is_not_shown_without_a_choice() -> None:
    for attempts in ([FTRACE], [REFUSED, dataclasses.replace(REFUSED, kind="ftrace")]):
        report = doctor.judge(HEALTHY, attempts)
        assert "--source auto" not in {check.name for check in report.checks}


@pytest.mark.parametrize(
    ("what", "attempts"),
    [
        (HEALTHY, [REFUSED, dataclasses.replace(REFUSED, kind="ftrace")]),
        (HEALTHY, []),
        (HEALTHY, [Attempt("bpf", NO_RUN)]),
        (HEALTHY, [Attempt("bpf", ())]),
        (facts(types=host.Types(True, True, False)), [BPF]),
        (facts(types=host.Types(True, False, None)), [BPF]),
    ],
)
def test_not_ok_unless_exits_can_be_seen(what: host.Facts, attempts: list[Attempt]) -> None:
    assert not doctor.judge(what, attempts).ok


def test_an_old_kernel_still_shows_poison_and_sigbus() -> None:
    report = doctor.judge(facts(kernel="6.1.0", types=host.Types(True, True, False)), [BPF])
    assert "no memory-fault exit; poison and SIGBUS can be seen" in report.verdict
    assert check(report, "memory-fault exit").fix == "run Linux 6.8 or newer"


def test_the_capability_never_decides() -> None:
    assert doctor.judge(facts(kvm=host.Kvm(True, None, True, 0)), [BPF]).ok


@pytest.mark.parametrize(
    ("changes", "name", "fix"),
    [
        ({"privilege": host.Privilege(1000, 0)}, "privilege", "sudo"),
        ({"lockdown": "confidentiality"}, "lockdown", "without lockdown=confidentiality"),
        ({"kvm": host.Kvm(False, None, False)}, "kvm", "modprobe"),
        ({"kvm": host.Kvm(True, "kvm_amd", False)}, "kvm", "firmware"),
        ({"types": host.Types(False, False, None)}, "types (BTF)", "CONFIG_DEBUG_INFO_BTF"),
        ({"types": host.Types(True, False, None)}, "memory-fault exit", "DEBUG_INFO_BTF_MODULES"),
        ({"tracefs": None}, "tracefs", "mount -t tracefs"),
        ({"tracefs": mount.Tracefs("/t", False, False, False)}, "tracefs", "lockdown"),
        ({"tracefs": mount.Tracefs("/t", True, False, True)}, "tracefs", "CONFIG_KPROBE_EVENTS"),
        ({"poison_names": False}, "poison's names", "tracefs mounted"),
        ({"memory_failure": {"memory_failure_recovery": 0}}, "memory recovery", "recovery=1"),
        ({"memory_failure": {"enable_soft_offline": 0}}, "soft offline", "soft_offline=1"),
        (
            {"memory_failure": {"panic_on_unrecoverable_memory_failure": 1}},
            "memory panic",
            "vm.panic_on_unrecoverable_memory_failure=0",
        ),
        ({"bcc": host.Bcc(None, "not installed", "apt install python3-bpfcc")}, "bcc", "bpfcc"),
    ],
)
def test_what_is_missing_has_a_fix(changes: dict[str, Any], name: str, fix: str) -> None:
    report = doctor.judge(facts(**changes), [REFUSED])
    found = check(report, name)
    assert not found.ok
    assert fix in found.fix
    assert found.fix in render(report)


def test_lockdown_integrity_is_fine() -> None:
    assert check(doctor.judge(facts(lockdown="integrity"), [BPF]), "lockdown").ok
    assert check(doctor.judge(facts(lockdown=None), [BPF]), "lockdown").ok


def test_every_probe_is_shown_with_what_is_missing_without_it() -> None:
    for attempts in ([BPF], [REFUSED], [Attempt("bpf", NO_RUN)], []):
        report = doctor.judge(HEALTHY, attempts)
        shown = [c.name for c in report.checks if c.name.startswith("probe ")]
        assert shown == [f"probe {spec.name}" for spec in specs("x86_64")]
    report = doctor.judge(HEALTHY, [Attempt("bpf", NO_RUN)])
    assert check(report, "probe run").found == "no BTF"
    assert (
        check(report, "probe run").fix == "not seen without it: exits of KVM_RUN: errno, gpa, flags"
    )
    report = doctor.judge(HEALTHY, [REFUSED])
    assert check(report, "probe run").found == "not tried (kvm_arch_vcpu_ioctl_run is there)"
    assert check(report, "probe gmem").found == "no function to attach to"


def test_corrected_errors_are_a_note() -> None:
    report = doctor.judge(facts(ras_cec=True), [BPF])
    assert report.ok
    assert check(report, "corrected errors").ok is None


def test_text_is_aligned_and_has_words_beside_signs() -> None:
    report = doctor.judge(facts(tracefs=None), [REFUSED])
    text = render(report, verbose=True)
    rows = [line for line in text.splitlines() if line[:1] in "✓✗–" and "  " in line]
    assert {line[2:6].strip() for line in rows} == {"yes", "NO"}
    columns = {line.index(c.found) for line, c in zip(rows, report.checks, strict=False)}
    assert len(columns) == 1


NO_BCC = host.Bcc(None, "not installed", "apt install it")


@pytest.mark.parametrize(
    ("programs", "bcc_ok", "found", "fix"),
    [
        (doctor_host.KeptPrograms("/kept", "0.31.0", None), None, "compiled for this kernel", ""),
        (doctor_host.KeptPrograms("/kept", None, None), False, "not compiled", "see bcc"),
        (doctor_host.KeptPrograms("/kept", None, "/kept: full"), False, "/kept: full", "root's"),
    ],
)
def test_kept_programs(
    programs: doctor_host.KeptPrograms, bcc_ok: bool | None, found: str, fix: str
) -> None:
    """Where they are, bcc is not needed; where they are not, nothing is wrong, but slow."""
    report = doctor.judge(facts(bcc=NO_BCC), [BPF], programs)
    assert check(report, "bcc").ok is bcc_ok
    line = check(report, "eBPF programs")
    assert line.ok is (True if programs.bcc else None)
    assert found in line.found
    assert fix in line.fix
    assert line.found in render(report)


BCC_SAYS = (
    "Failed to load BPF program b'kretfunc__kvm__kvm_arch_vcpu_ioctl_run': No such process "
    "(bpf: kvm__kvm_arch_vcpu_ioctl_run is not found in vmlinux BTF)"
)
REASON = "this bcc cannot attach to modules (0.29 can), and this kernel has no kprobes"


def test_reasons_are_for_people_and_what_libraries_say_is_behind_verbose() -> None:
    probe = Probe("run", False, "kvm_arch_vcpu_ioctl_run", None, REASON, BCC_SAYS)
    report = doctor.judge(HEALTHY, [Attempt("bpf", (probe,))])
    text = render(report)
    assert REASON in text
    assert "kretfunc__" not in text
    assert BCC_SAYS in render(report, verbose=True)
    answer = as_object(report)
    (found,) = [c for c in answer["checks"] if c["name"] == "probe run"]
    assert (found["found"], found["detail"]) == (REASON, BCC_SAYS)
    assert answer["sources"][0]["probes"][0]["detail"] == BCC_SAYS


@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    refused = dataclasses.replace(REFUSED, detail=BCC_SAYS)
    probe = Probe("run", False, "kvm_arch_vcpu_ioctl_run", None, REASON, BCC_SAYS)
    for attempts in ([BPF], [refused, FTRACE], [Attempt("bpf", (probe,))]):
        text = render(doctor.judge(HEALTHY, attempts), width=width, verbose=True)
        assert max(len(line) for line in text.splitlines()) <= width
        assert "CAP_SYS_RESOURCE" in text


def test_a_terminal_too_narrow_for_all_this_still_shows_it() -> None:
    assert "CAP_BPF" in render(doctor.judge(HEALTHY, [BPF]), width=1)


def test_the_source_that_auto_takes_is_the_one_that_sees_more() -> None:
    report = doctor.judge(HEALTHY, [Attempt("bpf", NO_RUN), FTRACE])
    assert report.ok
    assert report.verdict.endswith("by ftrace")
    assert check(report, "--source auto").found == "ftrace (bpf does not see run here)"
    assert check(report, "probe run").ok


# -- one fact, one cure


def test_each_cure_is_named_once() -> None:
    nothing = facts(
        tracefs=None,
        poison_names=False,
        bcc=NO_BCC,
        kvm=host.Kvm(False, None, False),
        types=host.Types(True, False, None),
    )
    refused = [
        Attempt("bpf", refused="bcc is not installed", hint=NO_BCC.fix),
        Attempt("ftrace", refused="tracefs is not mounted", hint=doctor_host._MOUNT_TRACEFS),
    ]
    report = doctor.judge(nothing, refused, doctor_host.KeptPrograms("/kept", None, None))
    fixes = [one["fix"] for one in as_object(report)["checks"] if "fix" in one]
    named = [fix for fix in fixes if not fix.startswith(("see ", "not seen without it: "))]
    assert len(named) == len(set(named)) == 3
    assert check(report, "poison's names").fix == "see tracefs"
    assert check(report, "memory-fault exit").fix == "see kvm"
    assert check(report, "eBPF programs").fix == check(report, "source bpf").fix == "see bcc"
    assert check(report, "source ftrace").fix == "see tracefs"


def test_probes_missing_for_one_reason_are_one_line() -> None:
    report = doctor.judge(HEALTHY, [REFUSED])
    lines = render(report).splitlines()
    assert [line for line in lines if " probe " in line] == []
    (line,) = [line for line in lines if f"{len(ALL)} probes" in line]
    assert "not tried: no source works: run, gmem, faultin" in line
    assert render(report, verbose=True).count("not seen without it") == len(ALL)
    waiting = tuple(Probe(p.name, p.name == "mce", p.target, None, "kvm is gone") for p in ALL)
    text = render(doctor.judge(HEALTHY, [Attempt("bpf", waiting)]))
    assert "kvm is gone: run, gmem" in text
    assert "probe mce " in text


# -- what the kernel does about poison


def test_usual_settings_are_fine() -> None:
    settings = {
        "memory_failure_recovery": 1,
        "memory_failure_early_kill": 1,
        "enable_soft_offline": 1,
        "panic_on_unrecoverable_memory_failure": 0,
    }
    report = doctor.judge(facts(memory_failure=settings), [BPF])
    found = {one.name: one.ok for one in report.checks}
    assert found["memory recovery"] is found["soft offline"] is True
    assert found["early notification"] is True
    assert "memory panic" not in found


def test_who_is_notified_early() -> None:
    vmms = [
        doctor_host.NotifiedVmm("web-1 (4001)", True),
        doctor_host.NotifiedVmm("db-1 (4002)", False),
        doctor_host.NotifiedVmm("pid 4003", None),
    ]
    settings = {"memory_failure_early_kill": 0}
    report = doctor.judge(facts(memory_failure=settings), [BPF], vmms=vmms)
    early = check(report, "early notification")
    assert early.ok is None
    assert early.found == (
        "when a page is poisoned: web-1 (4001); only when a guest accesses it: db-1 (4002); "
        "not known: pid 4003"
    )
    assert "cannot avoid the page" in early.fix
    assert report.ok
    report = doctor.judge(facts(memory_failure=settings), [BPF], vmms=vmms[:1])
    assert check(report, "early notification").ok is True
    many = [doctor_host.NotifiedVmm(f"pid {n}", False) for n in range(100)]
    assert "pid 7 and 92 more" in render(doctor.judge(HEALTHY, [BPF], vmms=many))


# -- beside a serve


def test_a_serve_is_what_is_judged() -> None:
    unable = facts(privilege=host.Privilege(1000, 0), tracefs=None, poison_names=False, bcc=NO_BCC)
    serving = doctor.Serving(144, __version__)
    report = doctor.judge(unable, [BPF], serving=serving)
    assert report.ok
    assert report.verdict == "memory-fault exits are seen here, by bpf of kvmtrace serve"
    assert "pid 144" in check(report, "serve").found
    text = render(report)
    assert "NO" not in text
    assert "→" not in text
    other = doctor.judge(HEALTHY, [BPF], serving=doctor.Serving(144, "0.0.7"))
    assert f"this is kvmtrace {__version__}" in check(other, "serve").fix


def test_a_serve_that_does_not_see_exits_is_no_excuse() -> None:
    blind = Attempt("bpf", NO_RUN)
    report = doctor.judge(facts(bcc=NO_BCC), [blind], serving=doctor.Serving(144, __version__))
    assert not report.ok
    assert check(report, "bcc").ok is False
    assert check(report, "probe run").ok is False


def test_ascii() -> None:
    report = doctor.judge(facts(tracefs=None), [REFUSED])
    render(report, ascii_only=True).encode("ascii")


def test_json_leaves_out_what_is_unknown() -> None:
    answer = json.loads(json.dumps(as_object(doctor.judge(facts(ras_cec=True), [BPF]))))
    assert answer["ok"] is True
    (note,) = [c for c in answer["checks"] if c["name"] == "corrected errors"]
    assert "ok" not in note
    assert answer["sources"][0]["probes"][0]["name"] == "run"


# -- the command


def test_command_tries_both_sources_and_detaches(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[FakeSource] = []

    def open_source(kind: str) -> FakeSource:
        if kind == "bpf":
            raise KvmtraceError("bcc is not installed", "apt install python3-bpfcc")
        opened.append(FakeSource())
        return opened[-1]

    monkeypatch.setattr(host, "examine", lambda: HEALTHY)
    monkeypatch.setattr(sources, "open_source", open_source)
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert "bcc is not installed" in result.stdout
    assert "by ftrace" in result.stdout
    assert [source.closed for source in opened] == [1]
    result = invoke("doctor", "--json", "--source", "bpf")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["sources"] == [
        {"name": "bpf", "works": False, "why": "bcc is not installed", "probes": []}
    ]
    assert len(opened) == 1
