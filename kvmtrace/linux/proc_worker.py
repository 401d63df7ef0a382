"""The worker process that reads other processes: it calls the functions that it is sent.

A read of /proc/PID can take another process's locks (mmap_lock for cmdline, maps and pagemap,
exec_update_lock for syscall) or depend on a file system that an unprivileged process serves, so it
may never return. ``proc_reader`` can give up a read that is done here. Messages that are sent:
``READY`` once; then for each call ``(VALUE, result)`` or ``(ERROR, text)``. A generator's items are
sent as ``(ITEM, item)`` before ``(VALUE, None)``. An item None only means that the generator is at
work, so at most one is sent in ``ALIVE_SECONDS``.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

from kvmtrace.linux import privileges

READY, VALUE, ITEM, ERROR = "ready", "value", "item", "error"
ALIVE_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    """Serve the other end of a ``multiprocessing.Pipe`` until that is closed."""
    # First, because a change of credentials can undo the next call (kernel/cred.c).
    privileges.give_up(privileges.READING)
    # While a read hangs, nothing notices that the pipe was closed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with Connection(descriptor) as parent, contextlib.suppress(EOFError, OSError):
        parent.send((READY, None))
        while True:
            function, arguments = parent.recv()
            try:
                result = function(*arguments)
                if isinstance(result, Iterator):
                    _send_all(parent, result)
                    result = None
            except Exception as error:
                parent.send((ERROR, f"{type(error).__name__}: {error}"))
            else:
                parent.send((VALUE, result))


def _send_all(parent: Connection, items: Iterator[object]) -> None:
    sent = 0.0
    for item in items:
        now = time.monotonic()
        if item is None and now - sent < ALIVE_SECONDS:
            continue
        sent = now
        parent.send((ITEM, item))


if __name__ == "__main__":
    main(int(sys.argv[1]))
