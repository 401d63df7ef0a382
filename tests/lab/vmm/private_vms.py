"""Conversion exits on a kernel that offers no private memory: one bit in it is set, from outside.

Debian's kernels are built without CONFIG_KVM_SW_PROTECTED_VM, and the other VM types with private
memory need SEV-SNP or TDX hardware. But KVM has all the code (memory attributes, the check that
annotates a mismatch): what is missing is the bit in `kvm_caps.supported_vm_types`. QEMU's gdbstub
can write a machine's memory, so a lab test sets it there, and then
`vmm "create p private=1" "convert p +1 1000"` gets 1000 annotated EFAULTs that never asked
guest_memfd. `flags` is 0 in them: what sets KVM_MEMORY_EXIT_FLAG_PRIVATE is compiled out.

    offer(machine)    # a tests.lab.machine.Machine; before the first VM
"""

import re
import socket
from pathlib import Path
from typing import Any

SW_PROTECTED_VM = 1 << 1

# Run inside the machine: the variable's address by kallsyms, the member's offset by BTF (libbpf
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
    """The remote protocol's four words that are needed: the machine stands still in between."""

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
        said = b""
        while not re.search(rb"\$[^#]*#..", said):
            more = self._socket.recv(4096)
            if not more:
                raise ConnectionError("QEMU's gdbstub closed the connection")
            said += more
        self._socket.sendall(b"+")
        return said.partition(b"$")[2].partition(b"#")[0].decode()

    def read_u32(self, address: int) -> int:
        return int.from_bytes(bytes.fromhex(self._ask(f"m{address:x},4")), "little")

    def write_u32(self, address: int, value: int) -> None:
        answer = self._ask(f"M{address:x},4:{value.to_bytes(4, 'little').hex()}")
        if answer != "OK":
            raise OSError(f"gdbstub: writing {address:#x}: {answer}")


def offer(machine: Any) -> None:
    """Let this machine's KVM create KVM_X86_SW_PROTECTED_VM machines."""
    said = machine.run(["python3", "-c", _WHERE], timeout=60, check=True).stdout
    base = re.search(r"^([0-9a-f]+) \w kvm_caps\s", said, re.MULTILINE)
    offset = re.search(r"^offset (\d+)", said, re.MULTILINE)
    if not base or not offset:
        raise LookupError(f"kvm_caps.supported_vm_types is not to be found: {said!r}")
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
