"""Start a command in a terminal, and print what it took until it printed a pattern.

``PATTERN COMMAND…`` as arguments. Prints JSON: "seconds", and of the process then "rss_kib" and
"anon_kib". It runs in a machine of the lab (``python3 -c``), by the machine's clock. Imports
nothing of tests.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
import time
from pathlib import Path


def _kib(status: str, field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) if match else 0


def main() -> None:
    """As the module says. Raises OSError if the command ends first."""
    pattern, *command = sys.argv[1:]
    began = time.monotonic()
    pid, terminal = pty.fork()
    if not pid:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        os.execvp(command[0], command)
    seen = b""
    while not re.search(pattern.encode(), seen):
        seen += os.read(terminal, 1 << 16)
    seconds = time.monotonic() - began
    status = Path(f"/proc/{pid}/status").read_text()
    os.kill(pid, signal.SIGTERM)
    try:
        while os.read(terminal, 1 << 16):
            pass
    except OSError:  # EIO: nobody has it open any more
        os.waitpid(pid, 0)
    found = {"rss_kib": _kib(status, "VmRSS"), "anon_kib": _kib(status, "RssAnon")}
    print(json.dumps({"seconds": seconds, **found}))


if __name__ == "__main__":
    main()
