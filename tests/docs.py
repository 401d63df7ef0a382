"""Renew what README.md and docs/ show of kvmtrace's output: `make readme`, `make picture`.

A fenced block of kind ``console`` has command lines (``$ …``), each with its output below. The
commands read recordings under tests/recordings/, so that readers can run them in a clone.
"""

from __future__ import annotations

import asyncio
import html
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from kvmtrace.correlate import Correlator
from kvmtrace.model import Snapshot
from kvmtrace.sources.recording import RecordingSource
from kvmtrace.views.terminal.app import TopApp
from kvmtrace.views.terminal.watched import Watched

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md")
STORY = ROOT / "tests/recordings/story.jsonl"
# `kvmtrace top` in each of its sizes; README.md shows the first one.
PICTURES = {
    ROOT / "docs/top.svg": (120, 27),
    ROOT / "docs/top-160.svg": (160, 27),
    ROOT / "docs/top-80.svg": (80, 24),
    ROOT / "docs/top-40.svg": (40, 24),
}

_COLUMNS = "100"
_CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
_TEXT = re.compile(r"<text[^>]*>(.*?)</text>")


# -- the pictures of `kvmtrace top`


def picture(width: int, height: int) -> str:
    """Return `kvmtrace top` at the end of the story, as SVG without fonts of its own."""
    return _FONTS.sub("", asyncio.run(_drawn((width, height))))


async def _drawn(size: tuple[int, int]) -> str:
    # Of the last snapshots, so that rates are known.
    shown = list(snapshots())[-9:]
    clock = [one.last_ts or 0 for one in shown]
    app = TopApp(Watched(lambda: shown[0], lambda: clock[0]), 3600)
    async with app.run_test(size=size) as pilot:
        while len(shown) > 1:
            del shown[0], clock[0]
            app.tick()
        await pilot.pause()
        return app.export_screenshot(title="kvmtrace top")


def snapshots() -> Iterator[Snapshot]:
    """Yield the state of the host after each event of the story."""
    source = RecordingSource(str(STORY))
    try:
        correlator = Correlator(page_shift=source.recorded.page_shift)
        while not source.done:
            for event in source.poll(0):
                correlator.feed(event)
                yield correlator.snapshot().of_log(source.recorded, source.probes())
    finally:
        source.close()


def words(svg: str) -> list[str]:
    """Return the text of a picture, piece by piece. Styles and places differ by Rich's version."""
    return [html.unescape(text).replace("\xa0", " ").strip() for text in _TEXT.findall(svg)]


# -- output of commands


def with_output(page: str) -> str:
    """Return a page whose console blocks show what their commands print now."""
    return _CONSOLE.sub(lambda block: f"```console\n{_run_again(block[1])}```", page)


def _run_again(block: str) -> str:
    commands = [line for line in block.splitlines() if line.startswith("$ ")]
    return "".join(f"{line}\n{output_of(line[2:])}" for line in commands)


def output_of(command: str) -> str:
    """Run a line of shell in the clone; return what it prints on 100 columns. It must succeed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-ec", command],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "COLUMNS": _COLUMNS, "LC_ALL": "C.UTF-8", "TZ": "UTC"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or done.stderr:
        raise ValueError(f"{command}: status {done.returncode}: {done.stderr.strip()}")
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


def main() -> None:
    """Draw the pictures and, unless the argument is ``picture``, renew the output of commands."""
    for path, size in PICTURES.items():
        path.write_text(picture(*size))
    if sys.argv[1:] != ["picture"]:
        for page in PAGES:
            page.write_text(with_output(page.read_text()))


if __name__ == "__main__":
    main()
