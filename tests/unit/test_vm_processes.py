"""Which processes hold VMs, and how many."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmtrace.vmm import identity
from kvmtrace.vmm.identity import vm_descriptor, vm_processes
from tests.unit.fake_proc import Proc


def test_vm_processes(proc: Proc, tmp_path: Path) -> None:
    vm, vcpu = "anon_inode:kvm-vm", "anon_inode:kvm-vcpu:0"
    proc.add(1, fds=("/dev/null", "socket:[1]", "anon_inode:[eventfd]"))
    proc.add(2, fds=(vm, vm, "/dev/kvm"))
    proc.add(3, fds=(vcpu,))
    proc.add(4, fds=("anon_inode:[kvm-vm]",))
    (tmp_path / "5").mkdir()  # going: no fd directory any more
    (tmp_path / "self").mkdir()
    assert vm_processes(str(tmp_path)) == {2: 2, 3: 0, 4: 1}
    assert [vm_descriptor(pid, str(tmp_path)) is not None for pid in (1, 2, 3, 5, 6)] == [
        False,
        True,
        True,
        False,
        False,
    ]


def descriptors(tmp_path: Path, held: dict[int, str]) -> None:
    """A /proc of our namespace, in which this process holds these KVM descriptors."""
    (tmp_path / "self").symlink_to(str(os.getpid()))
    directory = tmp_path / str(os.getpid()) / "fd"
    directory.mkdir(parents=True)
    for number, what in held.items():
        (directory / str(number)).symlink_to(f"anon_inode:{what}")


@pytest.fixture
def pipes() -> Iterator[list[int]]:
    """Two open files with three and two descriptors; skips if the kernel cannot compare them."""
    one, other = os.pipe()
    held = [one, os.dup(one), other, os.dup(one), os.dup(other)]
    try:
        identity._compare(os.getpid(), one, other)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS):
            raise
        pytest.skip("kcmp is not allowed here")
    else:
        yield held
    finally:
        for descriptor in held:
            os.close(descriptor)


def test_descriptors_of_one_vm_are_one(pipes: list[int], tmp_path: Path) -> None:
    """crosvm duplicates a VM's descriptor for each interrupt controller."""
    one, again, other, third, more = pipes
    descriptors(tmp_path, dict.fromkeys((one, again, third), "kvm-vm"))
    assert vm_processes(str(tmp_path)) == {os.getpid(): 1}
    (tmp_path / str(os.getpid()) / "fd" / str(other)).symlink_to("anon_inode:kvm-vm")
    (tmp_path / str(os.getpid()) / "fd" / str(more)).symlink_to("anon_inode:kvm-vm")
    assert vm_processes(str(tmp_path)) == {os.getpid(): 2}


def test_descriptors_of_one_vcpu_are_one(pipes: list[int], tmp_path: Path) -> None:
    one, again, other, _, _ = pipes
    descriptors(tmp_path, {one: "kvm-vcpu:0", again: "kvm-vcpu:0"})
    assert vm_processes(str(tmp_path)) == {os.getpid(): 0}
    (tmp_path / str(os.getpid()) / "fd" / str(other)).symlink_to("anon_inode:kvm-vcpu:0")
    assert vm_processes(str(tmp_path)) == {os.getpid(): 2}


def test_two_vms_without_a_second_vcpu_of_a_number_are_two(
    pipes: list[int], tmp_path: Path
) -> None:
    """The kernel compares descriptors, so vCPUs are not used to tell VMs apart."""
    one, again, other, _, _ = pipes
    descriptors(tmp_path, {one: "kvm-vm", again: "kvm-vm", other: "kvm-vm", 4000: "kvm-vcpu:0"})
    assert vm_processes(str(tmp_path)) == {os.getpid(): 2}


def test_descriptors_that_are_not_compared(proc: Proc, tmp_path: Path) -> None:
    """In another namespace a process of ours may have the same pid, but other descriptors."""
    vm = "anon_inode:kvm-vm"
    proc.add(1, fds=(vm, vm, vm, "anon_inode:kvm-vcpu:0", "anon_inode:kvm-vcpu:1"))
    proc.add(2, fds=(vm, vm, vm, "anon_inode:kvm-vcpu:0", "anon_inode:kvm-vcpu:0"))
    proc.add(os.getpid(), fds=(vm, vm, vm))
    (tmp_path / "self").symlink_to("1")
    assert vm_processes(str(tmp_path)) == {1: 1, 2: 2, os.getpid(): 3}


def test_descriptors_without_number_make_no_vms_without_number(
    pipes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, again, other, third, more = pipes
    monkeypatch.setattr(identity, "_COMPARED", 3)
    descriptors(tmp_path, dict.fromkeys((one, again, other, third, more), "kvm-vm"))
    assert vm_processes(str(tmp_path))[os.getpid()] <= 2
    (tmp_path / "self").unlink()
    assert vm_processes(str(tmp_path)) == {os.getpid(): 3}


def test_no_proc_at_all(tmp_path: Path) -> None:
    assert vm_processes(str(tmp_path / "nothing")) == {}
