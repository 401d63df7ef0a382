"""A bundle: everything about the incidents of a host in one archive."""

from __future__ import annotations

import io
import json
import platform
import tarfile
from collections.abc import Mapping
from typing import IO, TypeVar

from kvmtrace import __version__
from kvmtrace.model import Incident, Snapshot
from kvmtrace.spool import LongText
from kvmtrace.views import json_output
from kvmtrace.views.explain import explain_text
from kvmtrace.views.redaction import Redaction

__all__ = ["Redaction", "Text", "contents", "write"]

Text = TypeVar("Text", str, LongText)


def contents(
    recording: Text, snapshot: Snapshot, version: str | None, bcc: str | None
) -> dict[str, str | Text]:
    """{file name: text}, all from the events.

    ``version``: of the kvmtrace that recorded them. ``bcc``: the version installed here, or None.
    """
    host = snapshot.host
    here = json_output.known(kvmtrace=__version__, python=platform.python_version(), bcc=bcc)
    versions = json_output.known(
        recorded_by=json_output.known(kvmtrace=version),
        bundled_by=here,
        kernel=host.kernel if host else None,
        host=host.name if host else None,
        source=host.source if host else None,
        hardware_corrupted_bytes=host.hardware_corrupted_bytes if host else None,
    )
    newest_first = sorted(snapshot.incidents, key=_begin, reverse=True)
    stories = [explain_text(incident, snapshot) for incident in newest_first]
    return {
        "events.jsonl": recording,
        "explain.txt": "\n\n\n".join(stories) + "\n" if stories else "no incidents\n",
        "top.json": json.dumps(json_output.top(snapshot), ensure_ascii=False, indent=1) + "\n",
        "versions.json": json.dumps(versions, indent=1) + "\n",
    }


def _begin(incident: Incident) -> int:
    return incident.poisoned_ts or incident.first_delivery_ts or 0


def write(file: IO[bytes], files: Mapping[str, str | LongText], mtime: int) -> None:
    """Write a tar.gz with one directory. ``mtime``: of its files, in seconds since the epoch."""
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=6) as archive:
        for name, text in sorted(files.items()):
            if isinstance(text, LongText):
                content, size = text.reading()
            else:
                data = text.encode("utf-8", "replace")
                content, size = io.BytesIO(data), len(data)
            entry = tarfile.TarInfo(f"kvmtrace-bundle/{name}")
            entry.size, entry.mode, entry.mtime = size, 0o600, mtime
            archive.addfile(entry, content)
