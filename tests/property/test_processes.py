"""Damaged text of /proc and /sys about processes, memory and the host.

Names in it were chosen by tenants; the numbers beside them are the kernel's.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kvmtrace import sanitize
from kvmtrace.enrich import page_tables, vcpu_state
from kvmtrace.linux import host, kallsyms, memory_failure, page_flags
from kvmtrace.linux.pagemap import SPECIAL_TYPES, parse_maps, referenced_pfn
from kvmtrace.sources.bpf import programs
from kvmtrace.sources.ftrace.vms import tgid_of
from kvmtrace.vmm import command_line, identity, paths
from tests.property import examples
from tests.property.damage import damaged, directory, placed
from tests.property.parsers import Parser, laws, text

PID = 77

MAPS = [
    b"""55d0c9a00000-55d0c9a28000 r--p 00000000 fe:01 1048599    /usr/bin/qemu-system-x86_64
7f2b40000000-7f2bc0000000 rw-s 00000000 00:01 2051           /memfd:pc.ram (deleted)
7f2c00000000-7f2c00200000 rw-p 00000000 00:00 0
7f2c10000000-7f2c10100000 rw-s 00000000 00:0f 1047           anon_inode:[kvm-gmem]
7f2c20000000-7f2c20003000 rw-s 00000000 00:10 1040           anon_inode:kvm-vcpu:0
7ffd1c1f6000-7ffd1c217000 rw-p 00000000 00:00 0              [stack]
""",
    b"7f0000000000-7f0000001000 rw-s 00000000 00:01 5 /memfd:a\rb (deleted)\n",
]
CMDLINES = [
    "\0".join(words.split(" ")).encode() + b"\0"
    for words in (
        "/usr/bin/qemu-system-x86_64 -name guest=web-1,debug-threads=on -uuid "
        "c7a5fdbd-edaf-9455-926a-d65c16db1809 -m 4096 -qmp unix:/run/vm/web-1/qmp.sock,server=on",
        "qemu-kvm -id 101 -smbios type=1,uuid=c7a5fdbd-edaf-9455-926a-d65c16db1809 "
        '-name {"guest":"db"} -chardev socket,id=x',
        "cloud-hypervisor --api-socket path=/run/ch/vm-7/api.sock --platform uuid=c7a5fdbd-edaf-"
        "9455-926a-d65c16db1809,serial_number=x",
        "/firecracker-v1.7.0-x86_64 --id 4a1b2c --start-time-us 5 -- --nothing",
        "/lib64/ld-linux-x86-64.so.2 --library-path /x ./crosvm run --socket /tmp/c.sock",
        "VBoxHeadless --comment web --startvm {c7a5fdbd-edaf-9455-926a-d65c16db1809}",
        "runsc boot --bundle=/x abcdef",
    )
]
CGROUPS = [
    b"0::/machine.slice/machine-qemu\\x2d1\\x2dweb.scope/libvirt/emulator\n",
    b"0::/kubepods.slice/kubepods-podc7a5fdbd_edaf_9455_926a_d65c16db1809.slice/cri-containerd-"
    + b"0123456789ab"
    + b"0" * 52
    + b".scope\n",
    b"12:memory:/qemu.slice/101.scope\n0::/system.slice/system-firecracker.slice/fc@web.service\n",
]
STATUS = b"Name:\tqemu-kvm\nUmask:\t0002\nState:\tS (sleeping)\nTgid:\t77\nNgid:\t0\nPid:\t77\n"
CAPABILITIES = b"CapPrm:\t000001ffffffffff\nCapEff:\t000001ffffffffff\n"
STAT = b"77 (CPU 0/KVM) S 1 77 77 0 -1 138412032 1 0 0 0 3 4 0 0 20 0 3 0 421337 9 9 184 0 0\n"
IOMEM = b"""00001000-0009ffff : System RAM
00100000-bfffffff : System RAM
  01000000-01ffffff : Kernel code
140000000-1bfffffff : Persistent Memory
  140000000-1bfffffff : dax0.0
    140000000-1bfffffff : System RAM (kmem)
"""
CPUINFO = b"""processor\t: 0
vendor_id\t: AuthenticAMD
flags\t\t: fpu vme smca
address sizes\t: 48 bits physical, 48 bits virtual
"""
KALLSYMS = b"""ffffffff81000000 T _text
ffffffff8126d1c0 t memory_failure
0000000000000000 T kvm_arch_vcpu_ioctl_run\t[kvm]
"""
FDINFO = b"pos:\t0\nflags:\t02000002\nrun_time_ns:\t7000\nrun_cnt:\t9\nrecursion_misses:\t0\n"


def _identify(cmdline: bytes = CMDLINES[0], comm: bytes = b"qemu\n", cgroup: bytes = b"") -> None:
    for name, data in (("cmdline", cmdline), ("comm", comm), ("cgroup", cgroup)):
        placed(data, f"proc/{PID}/{name}")
    found = identity.identify(PID, f"{directory()}/proc")
    for one in (found.name, found.uuid, found.vmm, found.vmid):
        assert one is None or fit(one)


def fit(name: str) -> bool:
    """Fit for a terminal and for a metric's label."""
    categories = {unicodedata.category(character) for character in name}
    return 0 < len(name) <= sanitize.NAME_LIMIT and not categories & {"Cc", "Cf", "Cs", "Zl", "Zp"}


def _words(cmdline: bytes) -> None:
    argv = cmdline.decode("utf-8", "replace").split("\0")
    _, kind, arguments = command_line.program("exe", argv)
    for one in {kind, "qemu", "cloud-hypervisor", "crosvm", "runsc", "virtualbox", "vmware", None}:
        for path in command_line.options(one, arguments).paths:
            paths.name_of_path(path)


def _cgroup(cgroup: str) -> None:
    paths.machine_of_cgroup(cgroup)
    paths.instance_of_cgroup(cgroup)
    paths.vmid_of_cgroup(cgroup)


def _stat(stat: bytes) -> None:
    path = placed(stat, f"proc/{PID}/task/{PID}/stat")
    placed(stat, f"proc/{PID}/task/{PID}/schedstat")
    proc = path[: path.index(f"/{PID}/")]
    identity.begun(PID, proc)
    known = vcpu_state.VcpuFollowUp(proc)
    known._stat(PID)
    known._cpu_ns(PID)


def _counts(total: bytes) -> None:
    path = placed(total, "sys/devices/system/node/node0/memory_failure/total")
    page_flags.failure_counts(path[: path.index("/devices")])


def _host(said: bytes) -> None:
    path = placed(said, "boot/config-6")
    host.privilege(path)
    host.lockdown(path)
    host.kernel_option("CONFIG_RAS_CEC", "6", f"{directory()}/boot", path)
    kallsyms.symbols(("memory_failure", "kvm_arch_vcpu_ioctl_run"), path)


test_any_input, test_long_input, test_what_is_known = laws(
    {
        "maps": Parser(parse_maps, MAPS),
        "cmdline": Parser(_identify, CMDLINES),
        "argv": Parser(_words, CMDLINES),
        "comm": Parser(lambda comm: _identify(comm=comm), [b"CPU 0/KVM\n", b"exe\n"]),
        "cgroup": Parser(lambda cgroup: _identify(b"", b"\n", cgroup), CGROUPS),
        "cgroup_names": Parser(text(_cgroup), CGROUPS),
        "path": Parser(text(paths.name_of_path), [b"/run/vm/web-1/qmp.sock", b"../home/x/a-b"]),
        "status": Parser(
            lambda said: tgid_of(PID, _proc(said)), [STATUS], found=[b"Tgid:\n", b"Tgid:\t\x007\n"]
        ),
        "flags": Parser(text(memory_failure.flags_of), [STAT, b"123 45 6\n"]),
        "stat": Parser(_stat, [STAT, b"123 45 6\n"]),
        "iomem": Parser(lambda said: page_flags.ram_ranges(placed(said, "iomem")), [IOMEM]),
        "meminfo": Parser(
            lambda said: page_flags.hardware_corrupted_bytes(placed(said, "meminfo")),
            [b"MemTotal:       16384 kB\nHardwareCorrupted:     8 kB\n"],
            found=[b"HardwareCorrupted: !   8 kB\n", b"HardwareCorrupted:"],
        ),
        "memory_failure": Parser(_counts, [b"3\n"]),
        "host": Parser(
            _host, [CAPABILITIES, b"none [integrity] x\n", b"CONFIG_RAS_CEC=y\n", KALLSYMS]
        ),
        "cpuinfo": Parser(
            lambda said: host.cpu(placed(said, "proc/cpuinfo").rpartition("/")[0]), [CPUINFO]
        ),
        "fdinfo": Parser(text(programs.counts_in), [FDINFO]),
    }
)


def _proc(status: bytes) -> str:
    return placed(status, f"proc/{PID}/status").rpartition(f"/{PID}/")[0]


@given(maps=damaged(MAPS))
@examples(150)
def test_a_line_of_maps_costs_that_line(maps: bytes) -> None:
    assert parse_maps(maps) == [area for line in maps.split(b"\n") for area in parse_maps(line)]


@given(name=st.text(max_size=60) | damaged([b"web-1", b"\x1b[2J\xe2\x80\xae"]).map(os.fsdecode))
@examples(300)
def test_a_clean_name_is_fit_to_be_shown(name: str) -> None:
    cleaned = sanitize.clean(name)
    assert not cleaned or fit(cleaned)
    assert sanitize.clean(cleaned) == cleaned


_PFN = st.integers(1, 1 << 20) | st.integers(1, (1 << 40) - 1)
_FLAGS = st.sampled_from([1 << 63, 1 << 62, 1 << 63 | 1 << 62, 1 << 61, 3 << 55, 0])


@given(
    entries=st.lists(st.tuples(_PFN, _FLAGS, st.none() | st.integers(0, 31)), max_size=200),
    wanted=st.sets(_PFN, max_size=page_tables.MAX_NEEDLES + 1),
    present=st.lists(st.integers(0, 199), max_size=4),
    padding=st.sampled_from([0, 64]),
)
@examples(200)
def test_pages_are_found_as_by_looking_at_each_entry(
    entries: list[tuple[int, int, int | None]], wanted: set[int], present: list[int], padding: int
) -> None:
    """``entries``: (pfn, flags, swap type). ``present``: of those, which are wanted, too."""
    values = [flags | (pfn if kind is None else pfn << 5 | kind) for pfn, flags, kind in entries]
    wanted |= {entries[at][0] for at in present if at < len(entries)}
    raw = b"".join(value.to_bytes(8, "little") for value in values) + bytes(8 * padding)
    found = set(page_tables._matches(raw, frozenset(wanted)))
    assert found == {
        (at, pfn)
        for at, value in enumerate(values)
        if (pfn := referenced_pfn(value)) is not None and pfn in wanted
    }


def test_special_types_are_within_five_bits() -> None:
    assert all(0 <= kind < 32 for kind in SPECIAL_TYPES)


@given(flags=st.lists(st.integers(0, (1 << 64) - 1), max_size=100))
@examples(150)
def test_poisoned_pages_are_those_with_the_flag(flags: list[int]) -> None:
    raw = b"".join(one.to_bytes(8, "little") for one in flags)
    assert list(page_flags.poisoned_in(raw)) == [n for n, one in enumerate(flags) if one >> 19 & 1]


@given(iomem=damaged([IOMEM]))
@examples(150)
def test_all_of_memory_can_be_looked_at(iomem: bytes) -> None:
    """The kernel accepts all offsets into /proc/kpageflags, 8 bytes a page."""
    for first, end in page_flags.ram_ranges(placed(iomem, "iomem")):
        assert 0 <= 8 * first <= 8 * end < 1 << 63


def test_processes_that_are_no_numbers_are_none(tmp_path: Path) -> None:
    for name in ("1", "self", "007", "\u0663", "9" * 30):
        (tmp_path / name).mkdir()
    assert 1 in identity.pids(str(tmp_path))
