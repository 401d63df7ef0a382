"""A headless Chromium, driven by its DevTools protocol over a pipe: pictures and measures of pages.

Chromium's own ``--window-size`` has a least width, above that of a phone.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What Chromium asks of itself in the background; there is nothing to ask for here.
_QUIET = (
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
)

# Chromium reads commands from descriptor 3 and answers at 4.
_AT_3_AND_4 = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(one), fcntl.F_DUPFD, 10) for one in sys.argv[1:3]]
for at, one in zip((3, 4), pipes):
    os.dup2(one, at)
    os.close(one)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def missing() -> str | None:
    """Why there is no browser; None if there is one."""
    return None if shutil.which("chromium") else "no chromium (Debian's package of that name)"


class Browser:
    """One tab. Raises OSError or RuntimeError if Chromium ends or refuses a command."""

    def __init__(self, to: int, answers: int) -> None:
        self._to = to
        self._answers = os.fdopen(answers, "rb")
        self._number = 0
        self._session: str | None = None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self._frame = self._ask("Page.getFrameTree")["frameTree"]["frame"]["id"]

    def show(self, html: str, width: int, height: int = 800, *, dark: bool = False) -> None:
        """Lay out a document in a window of CSS pixels; those below 600 are a phone's."""
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._ask("Page.setDocumentContent", frameId=self._frame, html=html)

    def measure(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        done = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(f"{expression}: {done['exceptionDetails']['text']}")
        return done["result"].get("value")

    def picture(self) -> bytes:
        """The whole page as PNG, also what is below the window."""
        size = self._ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        made = self._ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(made["data"])

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            pass  # an event
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        text = b""
        while not text.endswith(b"\0"):
            more = self._answers.read(1)
            if not more:
                raise OSError("Chromium ended")
            text += more
        read: dict[str, Any] = json.loads(text[:-1])
        return read


@contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium of its own, that ends with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        theirs, to = os.pipe()
        answers, from_them = os.pipe()
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", _AT_3_AND_4, str(theirs), str(from_them)),
                *("chromium", "--headless=new", "--no-sandbox", "--remote-debugging-pipe"),
                *(f"--user-data-dir={home}", *_QUIET, "about:blank"),
            ],
            pass_fds=(theirs, from_them),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(from_them)
        try:
            yield Browser(to, answers)
        finally:
            os.close(to)  # Chromium ends with its pipe
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
