"""kvmtrace's commands on a made-up host: ``python -m tests.unit.fake_host top``.

This runs commands of an installed kvmtrace where no kernel can be watched.
"""

from __future__ import annotations

from kvmtrace import cli, sources
from kvmtrace.sources import Source
from tests.unit.fake import STORY, FakeSource


def open_source(kind: str = "auto") -> Source:
    return FakeSource(STORY[:2], STORY[2:])


if __name__ == "__main__":
    sources.open_source = open_source
    cli.main()
