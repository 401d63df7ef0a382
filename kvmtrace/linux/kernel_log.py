"""Read what the kernel logged of memory errors (dmesg)."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator

from kvmtrace.sanitize import clean

MAX_LINES = 1000
_MAX_TEXT = 1024
_MAX_RECORDS = 1_000_000  # of a few MB at most, in a ring that may be written to meanwhile
_SECONDS = 5.0
_READ = 16384  # larger than any record (kernel/printk/printk.c, PRINTK_MESSAGE_MAX)
_READ_ALL, _SIZE_BUFFER = 3, 10  # syslog(2)

# mm/memory-failure.c, arch/x86/kernel/cpu/mce, drivers/acpi/apei, drivers/edac, drivers/ras
_ABOUT_MEMORY = re.compile(
    r"memory failure|soft[- ]?offlin|hardware error|machine check|poison|uncorrect|sigbus"
    r"|corrected error|hardware memory corruption|synchronous (?:external )?abort"
    r"|\b(?:mce|edac|ghes|bert|hest|ras|cec)\b",
    re.IGNORECASE,
)


def memory_errors(path: str = "/dev/kmsg") -> list[str]:
    """Return the kernel's last ``MAX_LINES`` lines about memory errors, with seconds since boot.

    Lines that programs wrote are left out. Raises OSError if the log cannot be read.
    """
    try:
        return _about_memory(of_kmsg(_kmsg(path)))
    except OSError:
        return _about_memory(of_syslog(_syslog()))


def _about_memory(lines: Iterable[tuple[str, str]]) -> list[str]:
    about = (f"[{seconds}] {text}" for seconds, text in lines if _ABOUT_MEMORY.search(text))
    return list(deque(about, MAX_LINES))


def of_kmsg(records: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (seconds, text) of the kernel's own records (Documentation/ABI/testing/dev-kmsg)."""
    for record in records:
        head, _, text = record.split(b"\n")[0].partition(b";")
        fields = head.split(b",")
        if len(fields) < 3 or not all(re.fullmatch(rb"\d{1,20}", one) for one in fields[:3]):
            continue
        if int(fields[0]) >> 3:
            continue  # a facility of programs
        microseconds = int(fields[2])
        seconds = f"{microseconds // 1_000_000:5d}.{microseconds % 1_000_000:06d}"
        yield seconds, _cleaned(text)


def of_syslog(log: bytes) -> Iterator[tuple[str, str]]:
    """The same of the text that syslog(2) returns."""
    for line in log.split(b"\n"):
        match = re.match(rb"<(\d{1,9})>\[ *(\d{1,20}\.\d{1,9})\] ?(.*)", line, re.DOTALL)
        if match and not int(match[1]) >> 3:
            yield match[2].decode().rjust(12), _cleaned(match[3])


def _cleaned(text: bytes) -> str:
    return clean(text.decode("utf-8", "replace"), _MAX_TEXT)


def _kmsg(path: str) -> Iterator[bytes]:
    """Yield the records there are; each read returns one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _SECONDS
        for _ in range(_MAX_RECORDS):
            try:
                record = os.read(descriptor, _READ)
            except BlockingIOError:
                return
            except OSError as error:
                # Overwritten meanwhile, or too long.
                if error.errno not in (errno.EPIPE, errno.EINVAL):
                    raise
                continue
            if not record or time.monotonic() > deadline:
                return
            yield record
    finally:
        os.close(descriptor)


def _syslog() -> bytes:
    libc = ctypes.CDLL(None, use_errno=True)
    size = libc.klogctl(_SIZE_BUFFER, None, 0)
    if size > 0:
        buffer = ctypes.create_string_buffer(size)
        size = libc.klogctl(_READ_ALL, buffer, size)
        if size >= 0:
            return buffer.raw[:size]
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))
