"""A bundle: all that is known in one archive, with VMs' names replaced if they must not leave."""

from __future__ import annotations

import dataclasses
import io
import json
import platform
import re
import tarfile
from collections.abc import Iterable, Mapping
from typing import IO, TypeVar

from kvmtrace import __version__, wire
from kvmtrace.events import Event, Sigbus, VmSeen
from kvmtrace.model import Snapshot
from kvmtrace.spool import LongText
from kvmtrace.views.explain import explain_text

Text = TypeVar("Text", str, LongText)


def contents(
    recording: Text, snapshot: Snapshot, version: str | None, bcc: str | None
) -> dict[str, str | Text]:
    """{file name: text} of what the events say.

    ``version``: of the kvmtrace that recorded them. ``bcc``: its version, None if it is not here.
    """
    host = snapshot.host
    here = wire.known(kvmtrace=__version__, python=platform.python_version(), bcc=bcc)
    versions = wire.known(
        recorded_by=wire.known(kvmtrace=version),
        bundled_by=here,
        kernel=host.kernel if host else None,
        host=host.name if host else None,
        source=host.source if host else None,
        hardware_corrupted_bytes=host.hardware_corrupted_bytes if host else None,
    )
    told = [explain_text(incident, snapshot) for incident in snapshot.incidents]
    return {
        "events.jsonl": recording,
        "explain.txt": "\n\n\n".join(told) + "\n" if told else "no incidents\n",
        "top.json": json.dumps(wire.top(snapshot), ensure_ascii=False, indent=1) + "\n",
        "versions.json": json.dumps(versions, indent=1) + "\n",
    }


def write(file: IO[bytes], files: Mapping[str, str | LongText], mtime: int) -> None:
    """A tar.gz with one directory."""
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


class Redaction:
    """Stand-ins for VMs' names and uuids: the same one for the same name, wherever it stands."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._names: dict[str, str] = {}
        for event in events:
            if isinstance(event, VmSeen):
                if event.name:
                    self._names.setdefault(event.name, f"vm-{len(self._names) + 1}")
                if event.uuid:
                    number = len(self._names) + 1
                    stand_in = f"00000000-0000-0000-0000-{number:012d}"
                    self._names.setdefault(event.uuid, stand_in)
        # Whole words only, the longest first: a VM may be called "vm" or "db", another "db-1".
        longest = sorted(self._names, key=len, reverse=True)
        self._pattern = re.compile(
            r"(?<![\w-])(" + "|".join(map(re.escape, longest)) + r")(?![\w-])"
            if longest
            else r"(?!)"
        )

    def events(self, events: Iterable[Event]) -> list[Event]:
        """The events with their names replaced: what is made of them has none."""
        return [self._event(event) for event in events]

    def _event(self, event: Event) -> Event:
        match event:
            case VmSeen():
                name, uuid = (self._names.get(word or "") for word in (event.name, event.uuid))
                return dataclasses.replace(event, name=name, uuid=uuid, vmid=None)
            case Sigbus():
                return dataclasses.replace(event, comm=None)
        return event

    def text(self, text: str) -> str:
        """A text that was made without regard to names."""
        return self._pattern.sub(lambda match: self._names[match[1]], text)
