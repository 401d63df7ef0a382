"""`explain` and `bundle` of an incident, from a recording."""

from __future__ import annotations

import json
import shlex
import tarfile
from pathlib import Path

import pytest

from kvmtrace import __version__, kvm
from kvmtrace.events import (
    Event,
    Exit,
    GmemPage,
    Host,
    HwError,
    KernelCounts,
    Owned,
    Owner,
    Poison,
    Sigbus,
    SoftOffline,
    VcpuState,
    VmGone,
    VmSeen,
)
from kvmtrace.sources.recording import Writer
from tests.unit.command_line import invoke
from tests.unit.fake import PROBES, SECOND, T0, machine_check

PFN = 0x103275
UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
POISONED = T0 + 10 * SECOND
STORY: tuple[Event, ...] = (
    VmSeen(T0, 1, 4001, "web-1", UUID, "qemu"),
    VmSeen(T0, 2, 4002, "db-1"),
    HwError(T0, "ras:mc_event", "corrected", PFN << 12, PFN, 64, 3, "CPU0_DIMM_A1", "read error"),
    HwError(T0, "GHES", "corrected", 0x57000, 0x57, 64, 2, "DIMM 0"),
    machine_check(
        T0 + 9 * SECOND, PFN << 12, PFN, 7, 3, 0, 0xBD80000000100134, 0x8C, vendor="GenuineIntel"
    ),
    Poison(
        POISONED,
        PFN,
        "dirty unevictable LRU page",
        "Failed",
        11,
        1,
        77,
        GmemPage(383, 8, (Owner(1, 8, 0x7F0000008000),)),
    ),
    Exit(POISONED + 50_000_000, 1, 0, 133, 39, True, 78, 0, 0x8000, 4096, 8, False, gmem=133),
    VcpuState(POISONED + SECOND, 1, 78, "outside", 0, 1000),
    VcpuState(POISONED + 2 * SECOND, 1, 78, "outside", 0, 0),
    SoftOffline(T0 + 13 * SECOND, 0x55, 0),
    SoftOffline(T0 + 13 * SECOND, 0x57, 0),
    SoftOffline(T0 + 13 * SECOND, 0x56, 16),
)


@pytest.fixture
def recording(tmp_path: Path) -> str:
    path = tmp_path / "story.jsonl"
    with path.open("w") as file:
        Writer(file, Host("sick", "6.18.15", "bpf", None, 4096)).write(STORY, PROBES)
    return str(path)


@pytest.mark.parametrize(
    ("target", "reading"),
    [
        ("0x103275", None),
        (str(PFN), None),
        ("103275", "as the beginning of 103275-1; pfn 0x1936b is not known to be poisoned"),
        ("0x103275000", "as a physical address: it is in pfn 0x103275"),
        ("0x8000@web-1", "as gpa 0x8000 (gfn 0x8) of web-1"),
        ("32768@4001", "as gpa 0x8000 (gfn 0x8) of web-1"),
        ("0x8@web-1", "as gfn 0x8 (gpa 0x8000) of web-1"),
        ("8@WEB", "as gfn 0x8 (gpa 0x8000) of web-1"),
        ("web-1", None),
        ("Web", "as a part of web-1"),
        (UUID, None),
        (UUID.upper(), None),
        (UUID[:8], "as a part of web-1"),
        ("4001", None),
        ("103275-1", None),
        ("10327", "as a pfn (physical address >> 12)"),
        ("103275-", "as the beginning of 103275-1"),
        ("CPU0_DIMM_A1", None),
        ("dimm_a1", "as a part of CPU0_DIMM_A1"),
    ],
)
def test_every_way_to_name_it(recording: str, target: str, reading: str | None) -> None:
    """And the screen says how it was read, where it could be read otherwise."""
    result = invoke("explain", target, "--from", recording)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert (f" Read {reading}. " in f"{text} ") if reading else " Read " not in text
    if target == "10327":
        assert text.startswith("OK pfn 0x2857 is not poisoned as far as is known")
        return
    assert result.output.startswith(
        "STOPPED  web-1 has been hit by a poisoned page: a vCPU stopped"
    )
    assert "\nThe page (incident 103275-1)\n" in result.output


def test_the_whole_story_in_eighty_columns(recording: str) -> None:
    text = invoke("explain", "web-1", "--evidence", "--from", recording).output
    assert max(map(len, text.splitlines())) <= 80
    order = [
        "STOPPED  web-1 has been hit by a poisoned page: a vCPU stopped 2 s ago.\n",
        "sick, Linux 6.18.15, kvmtrace 0.1.0 (bpf, a recording)\n",
        "as of 2026-09-21 14:13:33 UTC\n",
        "\nDo\n  1. Stop web-1 and start it again, best on another host: ",
        "\n         virsh destroy web-1 && virsh start web-1\n",
        "\n     Do not migrate, save, snapshot or dump web-1",
        "\n  2. Replace CPU0_DIMM_A1",
        "\nCan web-1 be migrated now? Not known, so better not: ",
        "\nWhat happened (2026-09-21, UTC)\n",
        "  14:13:20  corrected error by ras:mc_event: CPU0_DIMM_A1, 3 times\n",
        "    +9.0 s  recoverable error by machine check: consumed by CPU 3, socket 0",
        "  14:13:30  pfn 0x103275 poisoned: Failed",
        "            web-1: owned: gfn 0x8",
        "same thread as the poison, guest_memfd inode 383, index 0x8",
        "    +50 ms  web-1: KVM_RUN on vCPU 0: EHWPOISON, gpa 0x8000\n",
        "            by: same VM and gfn",
        "    +1.0 s  web-1: vCPU 0 sleeps outside KVM_RUN, 2 times within 1.0 s\n",
        "\nThe page (incident 103275-1)\n  pfn 0x103275, 4 KiB lost,",
        "gfn 0x8 of web-1 (pid 4001, qemu, ",
        "VMM notified by 1 exit of KVM_RUN",
        "\nHow we know\n  web-1: stopped\n    - vCPU 0 (thread 78) sleeps outside KVM_RUN, ",
    ]
    at = [text.find(part) for part in order]
    assert -1 not in at, order[at.index(-1)]
    assert at == sorted(at)


def test_without_evidence_a_line_points_to_it(recording: str) -> None:
    text = invoke("explain", "web-1", "--from", recording).output
    (line,) = [line for line in text.splitlines() if "--evidence" in line]
    assert "by: " not in text
    command = line.split("kvmtrace ")[1]
    shown = invoke(*shlex.split(command)).output
    assert "by: same VM and gfn" in shown


def test_json(recording: str) -> None:
    (told,) = json.loads(invoke("explain", "web-1", "--json", "--from", recording).output)
    assert (told["pfn"], told["state"], told["verdict"], told["bytes"]) == (
        PFN,
        "delivered",
        "stopped",
        4096,
    )
    assert told["origin"]["label"] == "CPU0_DIMM_A1"
    assert told["owners"][0]["vm"]["name"] == "web-1"
    assert [m["ts"] for m in told["timeline"]] == sorted(m["ts"] for m in told["timeline"])
    assert told["next"]


HEALTHY = "as far as is known, watching since 2026-09-21 14:13:20 UTC (13 s)."


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("db-1", [f"OK db-1 has no poisoned page {HEALTHY}", "db-1 (pid 4002) no failed exit of"]),
        (
            "0x9000@web-1",
            [
                f"OK 0x9000@web-1 is not poisoned {HEALTHY}",
                "Read both as gpa 0x9000 (gfn 0x9) and as gfn 0x9000 (gpa 0x9000000) of web-1.",
                "Elsewhere in web-1 STOPPED web-1 has been hit",
            ],
        ),
        ("0x1", [f"OK pfn 0x1 is not poisoned {HEALTHY}"]),
        ("0x58", [f"OK pfn 0x58 is not poisoned {HEALTHY}", "physical address >> 12"]),
        ("0xfedcba9876543", ["OK pfn 0xfedcba9876 is not poisoned", "Read as a physical address."]),
        ("0x55", ["WATCH pfn 0x55: soft-offlined; its contents were moved, no guest is harmed."]),
        (
            "0x57",
            [
                "WATCH pfn 0x57: soft-offlined; its contents were moved, no guest is harmed.",
                "DIMM 0, address 0x57000, corrected, 2 errors at this page (2 corrected), "
                "2 errors of this DIMM (2 corrected), reported by GHES",
            ],
        ),
        ("0x56", ["WATCH pfn 0x56: soft offline was tried and refused with EBUSY; still in use."]),
        ("DIMM 0", ["WATCH DIMM 0 had errors; no page of it is poisoned as far as", "2 errors"]),
    ],
)
def test_what_is_healthy_is_told_so(recording: str, target: str, parts: list[str]) -> None:
    """With what may be wrong nevertheless, and status 0."""
    result = invoke("explain", target, "--from", recording)
    text = " ".join(result.output.split())
    assert result.exit_code == 0, result.stderr
    for part in (*parts, "Not known - what these probes would show, which are not attached: mce"):
        assert part in text


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("nix", "there are: 103275-1, web-1, db-1"),
        ("web1", "near it: web-1; there are: 103275-1, web-1, db-1"),
        ("103275-2", "near it: 103275-1; "),
        ("0x8000@nix", "there are: web-1, db-1"),
        ("0x8000@web1", "near it: web-1; there are: web-1, db-1"),
        ("x@web-1", "before the @ stands a number, 'x' is none; there are: 103275-1"),
        ("@", "there are: 103275-1, web-1, db-1"),
        ("", "there are: 103275-1, web-1, db-1"),
        ("0x10000000000000", "physical addresses have 52 bits; there are: 103275-1"),
    ],
)
def test_what_names_nothing_is_a_line_and_a_hint(recording: str, target: str, hint: str) -> None:
    result = invoke("explain", target, "--from", recording)
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 2
    assert hint in result.stderr


@pytest.mark.parametrize(("target", "errno"), [("0x55", None), ("0x57", None), ("0x56", 16)])
def test_a_soft_offlined_page_as_json(recording: str, target: str, errno: int | None) -> None:
    (page,) = json.loads(invoke("explain", target, "--json", "--from", recording).output)
    assert (page["pfn"], page.get("errno")) == (int(target, 16), errno)
    assert ("origin" in page) == (target == "0x57")
    assert json.loads(invoke("explain", "db-1", "--json", "--from", recording).output) == []


def test_a_page_with_corrected_errors_only(tmp_path: Path) -> None:
    path = tmp_path / "story.jsonl"
    with path.open("w") as file:
        errors = [HwError(T0, "GHES", "corrected", 0x59040, 0x59, 64, 3, "A1")]
        errors.append(HwError(T0, "GHES", "corrected", 0x5A000, 0x5A, 64, 1, "unknown memory"))
        errors.append(HwError(T0, "GHES", "corrected", 0x200000, 0x200, 2 << 20, 1, "A1"))
        errors_and_poison = (*errors, Poison(T0, 7, "a", "b"))
        Writer(file, Host("sick", "6.18.15", "bpf")).write(errors_and_poison, PROBES)
    told = [invoke("explain", page, "--from", str(path)) for page in ("0x59", "0x5a", "0x200")]
    assert [one.exit_code for one in told] == [0, 0, 0]
    assert "WATCH  pfn 0x59 is not poisoned as far as is known; errors" in told[0].stdout
    assert "\nThe page\n  - 3 errors at this page (3 corrected), DIMM A1\n" in told[0].stdout
    assert "\nThe page\n  - 1 error at this page (1 corrected)\n" in told[1].stdout
    assert told[2].stdout.startswith("OK  pfn 0x200 is not poisoned as far as is known")
    (page,) = json.loads(invoke("explain", "0x59", "--json", "--from", str(path)).stdout)
    assert (page["pfn"], page["label"], page["label_names"]) == (0x59, "A1", "dimm")
    assert (page["errors"]["count"], page["errors"]["corrected"]) == (3, 3)


def test_a_number_that_is_both(tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    with path.open("w") as file:
        Writer(file, Host("sick", "6.18.15", "bpf")).write(
            (VmSeen(T0, 1, PFN), Poison(T0, PFN, "a", "b")), PROBES
        )
    result = invoke("explain", str(PFN), "--from", str(path))
    assert result.exit_code == 2
    assert "is a page and a process" in result.stderr


# Names that look like something else: VMs 1 to 9 have the gfn of their key, and the pid 4000 + key.
NAMED = (
    "web@prod",
    "0x10@prod",
    "4001",
    "0x123",
    "my vm",
    "101-1",
    UUID,
    "pid 4002",
    "@",
)


@pytest.fixture
def named(tmp_path: Path) -> str:
    path = tmp_path / "named.jsonl"
    with path.open("w") as file:
        writer = Writer(file, Host("sick", "6.18.15", "bpf", None, 4096))
        for key, name in enumerate(NAMED, 1):
            events: list[Event] = [
                VmSeen(T0, key, 4000 + key, name, vmid="8006" if key == 5 else None),
                Owned(T0, 0x100 + key, Owner(key, key, 0x7F0000000000), "pagemap"),
                Poison(T0, 0x100 + key, "dirty LRU page", "Recovered"),
            ]
            writer.write(events, PROBES)
    return str(path)


@pytest.mark.parametrize("key", range(1, len(NAMED) + 1))
def test_any_name_is_a_vm_s(named: str, key: int) -> None:
    """A number is a pid only if no VM has it as its name."""
    result = invoke("explain", f"{key << kvm.PAGE_SHIFT:#x}@{NAMED[key - 1]}", "--from", named)
    assert result.exit_code == 0, result.stderr
    assert f"\nThe page (incident {0x100 + key:x}-1)\n" in result.output


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("web@prod", "101-1"),
        ("0x10@prod", "102-1"),
        ("my vm", "105-1"),
        ("8006", "105-1"),
        ("8006 (my vm)", "105-1"),
        ("0x5000@8006", "105-1"),
        ("0x5000@my   vm", "105-1"),
        ("4001", "103-1"),
        ("pid 4001", "101-1"),
        ("pid 4002", "108-1"),
        ("4002", "102-1"),
        (UUID, "107-1"),
        ("@", "109-1"),
        ("0x3000@@", "OK  0x3000@@ is not poisoned"),
    ],
)
def test_what_goes_by_a_name_that_looks_like_another(named: str, target: str, said: str) -> None:
    result = invoke("explain", target, "--from", named)
    assert result.exit_code == 0, result.stderr
    assert (f"\nThe page (incident {said})\n" if "-1" in said else said) in result.output


def test_a_name_that_is_a_page_or_an_address_too(tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    events: list[Event] = [
        VmSeen(T0, 1, 4001, "0x103275"),
        VmSeen(T0, 2, 4002, "8@web"),
        VmSeen(T0, 3, 4003, "web"),
        Poison(T0, PFN, "a", "b"),
    ]
    with path.open("w") as file:
        Writer(file, Host("sick", "6.18.15", "bpf")).write(events, PROBES)
    page = invoke("explain", "0x103275", "--from", str(path))
    assert page.exit_code == 2
    assert f"hint: name the page {PFN}, or the VM 'pid 4001'" in page.stderr
    place = invoke("explain", "8@web", "--from", str(path))
    assert (place.exit_code, "name the VM by its pid" in place.stderr) == (2, True)


def test_a_vm_that_is_gone_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "gone.jsonl"
    churn = [e for n in range(10, 900) for e in (VmSeen(T0, n, 5000 + n), VmGone(T0, n))]
    with path.open("w") as file:
        Writer(file, Host("sick", "6.18.15", "bpf")).write(
            (*STORY, VmGone(POISONED + 3 * SECOND, 1), *churn), PROBES
        )
    text = invoke("explain", "web-1", "--evidence", "--from", str(path)).output
    assert text.startswith("CLOSED  It is over: web-1, which had a page that was poisoned 3 s ago,")
    assert "web-1 (pid 4001, qemu" in text
    assert "the VM was gone 2.95 s after it was first notified" in text


def test_bundle(recording: str, tmp_path: Path) -> None:
    path = tmp_path / "out.tar.gz"
    result = invoke("bundle", "-o", str(path), "--from", recording)
    assert result.exit_code == 0, result.output
    files = unpacked(path)
    assert set(files) == {"events.jsonl", "explain.txt", "top.json", "versions.json"}
    assert json.loads(files["versions.json"])["kernel"] == "6.18.15"
    assert json.loads(files["versions.json"])["hardware_corrupted_bytes"] == 4096
    assert "web-1: stopped" in files["explain.txt"]
    (tmp_path / "again.jsonl").write_text(files["events.jsonl"])
    again = invoke("explain", "web-1", "--evidence", "--from", str(tmp_path / "again.jsonl")).output
    assert again == invoke("explain", "web-1", "--evidence", "--from", recording).output
    assert path.stat().st_mode & 0o077 == 0
    refused = invoke("bundle", "-o", str(path), "--from", recording)
    assert (refused.exit_code, "already there" in refused.stderr) == (1, True)


@pytest.mark.parametrize("redact", [(), ("--redact",)])
def test_a_bundle_is_of_whoever_recorded(tmp_path: Path, redact: tuple[str, ...]) -> None:
    """Not of the user who makes the bundle, nor of a file whose name a tenant may have chosen."""
    path, out = tmp_path / "acme-corp.jsonl", tmp_path / "out.tar.gz"
    host = Host("sick", "6.18.15", "ftrace", "asked for", 4096)
    with path.open("w") as file:
        Writer(file, host, "0.0.7").write(STORY, PROBES)
    assert invoke("bundle", "-o", str(out), *redact, "--from", str(path)).exit_code == 0
    files = unpacked(out)
    assert not any("acme-corp" in text for text in files.values())
    header = json.loads(files["events.jsonl"].splitlines()[0])
    assert (
        header.items()
        >= {
            "kvmtrace_recording": 1,
            "version": "0.0.7",
            "name": "host-1" if redact else "sick",
            "kernel": "6.18.15",
            "source": "ftrace",
            "source_why": "asked for",
            "hardware_corrupted_bytes": 4096,
            "page_shift": kvm.PAGE_SHIFT,
        }.items()
    )
    told = json.loads(files["top.json"])["host"]
    assert (told["source"], told["source_why"]) == ("ftrace", "asked for")
    versions = json.loads(files["versions.json"])
    assert versions["recorded_by"] == {"kvmtrace": "0.0.7"}
    assert versions["bundled_by"]["kvmtrace"] == __version__
    assert versions["source"] == "ftrace"
    (tmp_path / "events.jsonl").write_text(files["events.jsonl"])
    again = json.loads(invoke("replay", "--json", str(tmp_path / "events.jsonl")).stdout)
    assert again["host"]["source_why"] == "replay of events.jsonl, from ftrace"


def test_a_log_has_the_memory_that_it_told_of_last(tmp_path: Path) -> None:
    """The header holds what was known when recording began."""
    path = tmp_path / "poisoned.jsonl"
    counts = (
        KernelCounts(T0, (), 4096, True),
        KernelCounts(T0 + SECOND, (("total", 2),), 12288),
    )
    with path.open("w") as file:
        Writer(file, Host("sick", "6.18.15", "bpf", None, 4096)).write((*counts, *STORY), PROBES)
    shown = json.loads(invoke("replay", "--json", str(path)).stdout)
    assert shown["host"]["hardware_corrupted_bytes"] == 12288
    assert "HardwareCorrupted 12 KiB" in invoke("replay", str(path)).stdout
    out = tmp_path / "out.tar.gz"
    invoke("bundle", "-o", str(out), "--from", str(path))
    files = unpacked(out)
    for name in ("top.json", "versions.json"):
        assert '"hardware_corrupted_bytes": 12288' in files[name]


def test_redacted_bundle_names_nobody(recording: str, tmp_path: Path) -> None:
    path = tmp_path / "out.tar.gz"
    assert invoke("bundle", "-o", str(path), "--redact", "--from", recording).exit_code == 0
    files = unpacked(path)
    for text in files.values():
        assert not any(name in text for name in ("web-1", "db-1", UUID))
    assert "vm-1: stopped" in files["explain.txt"]
    assert '"name":"vm-1"' in files["events.jsonl"]


def test_redacted_bundle_has_no_name_of_a_process_nor_a_number_of_a_vm(tmp_path: Path) -> None:
    path, out = tmp_path / "story.jsonl", tmp_path / "out.tar.gz"
    events: list[Event] = [
        VmSeen(T0, 1, 4001, "web-1", None, "qemu", "80061234"),
        Poison(T0, PFN, "a", "b"),
        Sigbus(T0, 9, 9, 4, 0x7F0000000000, pfn=PFN, comm="acme-billing"),
    ]
    with path.open("w") as file:
        Writer(file, Host("sick", "6.18.15", "bpf")).write(events, PROBES)
    for redact, there in (((), True), (("--redact", "--force"), False)):
        arguments = ("bundle", "-o", str(out), *redact, "--from", str(path))
        assert invoke(*arguments).exit_code == 0
        text = "".join(unpacked(out).values())
        assert [word in text for word in ("acme-billing", "80061234")] == [there, there]


def unpacked(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        found = {}
        for member in archive.getmembers():
            file = archive.extractfile(member)
            assert file is not None
            found[member.name.removeprefix("kvmtrace-bundle/")] = file.read().decode()
        return found


def test_a_huge_page_takes_its_neighbours(tmp_path: Path) -> None:
    """Each of its pages leads to the incident, and the size of the loss is shown."""
    path = tmp_path / "huge.jsonl"
    events: list[Event] = [
        VmSeen(T0, 1, 4001, "web-1"),
        Owned(T0, 0x121803, Owner(1, 0x203, 0x7F6AD9203000), "pagemap", 2 << 20),
        Poison(T0, 0x121803, "huge page", "Recovered"),
    ]
    with path.open("w") as file:
        Writer(file, Host("sick", "6.18.15", "bpf", None, 4096)).write(events, PROBES)
    for gpa in ("0x200000", "0x203000", "0x3fffff"):
        told = invoke("explain", f"{gpa}@web-1", "--from", str(path)).output
        assert (
            "gfn 0x203 (lost up to 0x200-0x3ff) of web-1 (pid 4001), hva 0x7f6ad9203000"
            in " ".join(told.split())
        )
    for gpa in ("0x1fffff", "0x400000"):
        told = invoke("explain", f"{gpa}@web-1", "--from", str(path)).output
        assert f"{gpa}@web-1 is not poisoned as far as is known" in " ".join(told.split())


@pytest.fixture
def damaged(recording: str) -> str:
    with open(recording, "a") as file:
        file.write('{"kind":"poison","ts":"now"}\n')
    return recording


@pytest.fixture
def cut(recording: str) -> str:
    with open(recording, "a") as file:
        file.write('{"kind":"poi')
    return recording


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("replay",), "103275-1"),
        (("replay", "--json"), '"103275-1"'),
        (("replay", "--events"), "incident 103275-1"),
        (("explain", "web-1", "--from"), "(incident 103275-1)"),
        (("explain", "web-9", "--from"), ""),
    ],
)
def test_what_came_before_the_damage_is_told(
    damaged: str, command: tuple[str, ...], told: str
) -> None:
    result = invoke(*command, damaged)
    assert result.exit_code == (1 if told else 2)
    assert told in result.stdout
    assert f"kvmtrace: {damaged}, line {len(STORY) + 3}: " in result.stderr


def test_what_came_before_the_damage_is_bundled(damaged: str, tmp_path: Path) -> None:
    out = tmp_path / "out.tar.gz"
    result = invoke("bundle", "-o", str(out), "--from", damaged)
    assert result.exit_code == 1
    assert f"line {len(STORY) + 3}: " in result.stderr
    assert "(incident 103275-1)" in unpacked(out)["explain.txt"]


def test_a_last_line_cut_off_is_reported(cut: str, tmp_path: Path) -> None:
    for command in (
        ("replay",),
        ("explain", "web-1", "--from"),
        ("bundle", "-o", str(tmp_path / "out.tar.gz"), "--from"),
    ):
        result = invoke(*command, cut)
        assert result.exit_code == 0
        assert f"kvmtrace: {cut}: the last line is cut off; left out\n" in result.stderr
