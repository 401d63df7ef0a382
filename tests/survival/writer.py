"""A process that keeps a storm of events: ``python -m tests.survival.writer FILE [EVENTS]``.

After each batch it prints how many events there were, as a serve would have shown them, and how
many of them are on the disk. It ends by itself after so many events, in order; else it has to be
killed.
"""

from __future__ import annotations

import sys
import time

from kvmtrace.events import Event, Exit, Host, VmSeen
from kvmtrace.session.archive import Archive

BATCH = 50
PAUSE = 0.01
HOST = Host("storm", "6.12.0", "bpf")


def event(number: int, ts: int) -> Event:
    """The event with this number, which its gpa has; the first one is of the VM."""
    if number == 0:
        return VmSeen(ts, 0, 4001, "web-1")
    return Exit(ts, 0, 0, 133, 39, True, 77, gpa=number << 12, size=4096, gfn=number)


def main() -> None:
    """Keep events until it is killed, or all are kept."""
    path, most = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None
    archive = Archive(path, HOST, lambda text: print(text, file=sys.stderr, flush=True))
    archive.begin()
    archive.start()
    number = 0
    while most is None or number < most:
        archive.add(event(number + more, time.time_ns()) for more in range(BATCH))
        number += BATCH
        print(number, archive.state().written, flush=True)
        time.sleep(PAUSE)
    archive.close()
    print("lost", archive.take_lost(), flush=True)


if __name__ == "__main__":
    main()
