"""Conversion exits on a kernel without private memory: a bit of KVM's data is set from outside.

Debian's kernels are built without CONFIG_KVM_SW_PROTECTED_VM, and other VM types with private
memory need SEV-SNP or TDX hardware. KVM still has the code (memory attributes, and the check that
annotates a mismatch); only the bit in `kvm_caps.supported_vm_types` is missing. QEMU's gdbstub can
write a machine's memory, so lab tests set it there. Then `vmm "create p private=1" "convert p +1
1000"` gets 1000 annotated EFAULTs for which guest_memfd was not called. Their `flags` are 0,
because the code that sets KVM_MEMORY_EXIT_FLAG_PRIVATE is compiled out.

    offer(machine)    # a tests.lab.machine.Machine; before the first VM
"""

import re
import socket
from pathlib import Path
from typing import Any

SW_PROTECTED_VM = 1 << 1

# Runs in the machine: address of the variable by kallsyms, offset of the member by BTF (libbpf
# comes with bcc).
_WHERE = r"""
import ctypes, struct
lib = ctypes.CDLL("libbpf.so.1")
for name in ("btf__load_vmlinux_btf", "btf__load_module_btf", "btf__type_by_id"):
    getattr(lib, name).restype = ctypes.c_void_p
lib.btf__name_by_offset.restype = ctypes.c_char_p
btf = ctypes.c_void_p(lib.btf__load_vmlinux_btf())
btf = ctypes.c_void_p(lib.btf__load_module_btf(b"kvm", btf) or btf.value)
at = lib.btf__type_by_id(btf, lib.btf__find_by_name_kind(btf, b"kvm_caps", 4))
info = struct.unpack("I", ctypes.string_at(at + 4, 4))[0]
for member in range(info & 0xffff):
    name, _, bits = struct.unpack("III", ctypes.string_at(at + 12 * (member + 1), 12))
    if lib.btf__name_by_offset(btf, name) == b"supported_vm_types":
        print("offset", bits // 8)
print(*(line for line in open("/proc/kallsyms") if line.split()[2] == "kvm_caps"))
"""


class GdbStub:
    """The few commands of gdb's remote protocol needed; the machine is stopped meanwhile."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        self._socket.connect(str(path))

    def __enter__(self) -> "GdbStub":
        return self

    def __exit__(self, *_: object) -> None:
        self._ask("D")
        self._socket.close()

    def _ask(self, command: str) -> str:
        self._socket.sendall(f"${command}#{sum(command.encode()) % 256:02x}".encode())
        output = b""
        while not re.search(rb"\$[^#]*#..", output):
            more = self._socket.recv(4096)
            if not more:
                raise ConnectionError("QEMU's gdbstub closed the connection")
            output += more
        self._socket.sendall(b"+")
        return output.partition(b"$")[2].partition(b"#")[0].decode()

    def read_u32(self, address: int) -> int:
        return int.from_bytes(bytes.fromhex(self._ask(f"m{address:x},4")), "little")

    def write_u32(self, address: int, value: int) -> None:
        answer = self._ask(f"M{address:x},4:{value.to_bytes(4, 'little').hex()}")
        if answer != "OK":
            raise OSError(f"gdbstub: writing {address:#x}: {answer}")


def offer(machine: Any) -> None:
    """Let the machine's KVM create VMs of type KVM_X86_SW_PROTECTED_VM."""
    output = machine.run(["python3", "-c", _WHERE], timeout=60, check=True).stdout
    base = re.search(r"^([0-9a-f]+) \w kvm_caps\s", output, re.MULTILINE)
    offset = re.search(r"^offset (\d+)", output, re.MULTILINE)
    if not base or not offset:
        raise LookupError(f"kvm_caps.supported_vm_types was not found: {output!r}")
    address = int(base[1], 16) + int(offset[1])
    path = machine.work / "gdb.sock"
    machine.qmp(
        "human-monitor-command", **{"command-line": f"gdbserver unix:{path},server=on,wait=off"}
    )
    with GdbStub(path) as stub:
        types = stub.read_u32(address)
        if types & ~0xFF or not types & 1:
            raise LookupError(f"{types:#x} at kvm_caps.supported_vm_types: not a set of VM types")
        stub.write_u32(address, types | SW_PROTECTED_VM)
    machine.qmp("human-monitor-command", **{"command-line": "gdbserver none"})
