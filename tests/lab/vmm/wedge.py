"""A VMM whose /proc files cannot be read: it holds its own mmap_lock, without any privilege.

In its own user and mount namespace it mounts a FUSE file system that it serves itself. It never
answers a page fault on a file there, which holds the lock for reading; another thread maps memory
and waits for the lock for writing. From then on, readers of its /proc/PID/cmdline or pagemap hang,
including pgrep and ps. Usage: wedge.py DIRECTORY; prints "wedged PID" just before that.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import sys
import threading
import time

KVM_CREATE_VM = 0xAE01
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000

# include/uapi/linux/fuse.h
READ = 15
FILE, SIZE = 2, 1 << 20
HEADER = struct.Struct("<IIQQIIIHH")  # of a request: length, opcode, unique, node, …

libc = ctypes.CDLL(None, use_errno=True)


def attributes(node: int) -> bytes:
    """struct fuse_attr."""
    mode, size = (0o100666, SIZE) if node == FILE else (0o40755, 0)
    return struct.pack("<6Q10I", node, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def answer(opcode: int, node: int) -> bytes | None:
    """The file system's answer to a request; None: it never answers."""
    forever = struct.pack("<Q", 1 << 30)
    match opcode:
        case 26:  # INIT
            return struct.pack("<4I2H2I2H8I", 7, 31, 0, 0, 0, 0, 4096, 1, 0, 0, *[0] * 8)
        case 1:  # LOOKUP
            return struct.pack("<2Q", FILE, 0) + 2 * forever + bytes(8) + attributes(FILE)
        case 3:  # GETATTR
            return forever + bytes(8) + attributes(node)
        case 14 | 27:  # OPEN, OPENDIR
            return struct.pack("<QII", 1, 0, 0)
    return None


def serve(fuse: int) -> None:
    """Answer everything but reads; the first read fails.

    The kernel holds the lock only during the second read of a fault (mm/filemap.c).
    """
    reads = 0
    while True:
        try:
            request = os.read(fuse, 1 << 20)
        except OSError:
            continue
        _, opcode, unique, node, *_ = HEADER.unpack_from(request)
        data = answer(opcode, node)
        reads += opcode == READ
        if opcode == READ and reads == 1:
            os.write(fuse, struct.pack("<IiQ", 16, -errno.EIO, unique))
        elif data is not None:
            os.write(fuse, struct.pack("<IiQ", 16 + len(data), 0, unique) + data)


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def main(directory: str) -> None:
    kvm = os.open("/dev/kvm", os.O_RDWR)
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        sys.exit(f"unshare: {os.strerror(ctypes.get_errno())}")
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"0 {uid} 1")
    write("/proc/self/gid_map", f"0 {gid} 1")
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"wedge", directory.encode(), b"fuse", 6, options):
        sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
    if not os.fork():
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os.close(vm)
        serve(fuse)
    os.close(fuse)
    area = mmap.mmap(os.open(f"{directory}/file", os.O_RDWR), 4096, access=mmap.ACCESS_COPY)
    at = ctypes.addressof(ctypes.c_char.from_buffer(area))
    byte = ctypes.create_string_buffer(1)
    # ctypes releases the GIL while these wait.
    threading.Thread(target=libc.memcpy, args=(byte, ctypes.c_void_p(at), 1), daemon=True).start()
    time.sleep(1)
    print(f"wedged {os.getpid()}", flush=True)
    libc.mmap(None, 4096, 1, 0x22, -1, 0)


if __name__ == "__main__":
    main(sys.argv[1])
