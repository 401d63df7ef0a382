"""What ``serve`` answers on its Unix socket only: the log as it grows, the model, and explanations.

``/events``: NDJSON, a recording that does not end (``sources.recording``): what was before, a line
of kind ``from_here_on``, and what happens. ``/snapshot``: as ``top --once --json`` prints it.
``/explain?target=VM&format=json``: as ``explain --json``; without ``format=json`` as text, with
``evidence=1`` as ``explain --evidence``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from http import HTTPStatus
from urllib.parse import parse_qs

from kvmtrace import __version__
from kvmtrace.errors import KvmtraceError
from kvmtrace.views import explain, explain_screen, json_output, lookup
from kvmtrace.views.format import plain
from kvmtrace.views.stamp import Stamp
from kvmtrace.views.web.answers import Answer, Shared, Tree, text
from kvmtrace.views.web.pages import Pages
from kvmtrace.views.web.server import Route
from kvmtrace.views.web.stream import Client, StreamRoute

_JSON = "application/json"
NDJSON = "application/x-ndjson"


def local_routes(
    pages: Pages, routes: Mapping[str, Route], send_log: Callable[[Client], None]
) -> dict[str, Route]:
    """All that the Unix socket answers, by path: ``routes``, which TCP has as well, and its own.

    ``send_log``: writes the log to a client.
    """
    return {
        **routes,
        "/events": StreamRoute(send_log, NDJSON),
        "/snapshot": Shared(lambda _: _snapshot(pages)),
        "/explain": Tree(lambda query: _explain(pages, query)),
    }


def _snapshot(pages: Pages) -> Answer:
    if (why := pages.failure()) is not None:
        return text(HTTPStatus.SERVICE_UNAVAILABLE, f"not healthy: {why}\n")
    return _json(json_output.top(pages.snapshot()))


def _json(found: object) -> Answer:
    return text(HTTPStatus.OK, json.dumps(found, ensure_ascii=False) + "\n", _JSON)


def _explain(pages: Pages, query: str) -> Answer:
    """``query``: ``target``, ``format`` (json or text) and ``evidence``, each of which may lack."""
    if (why := pages.failure()) is not None:
        return text(HTTPStatus.SERVICE_UNAVAILABLE, f"not healthy: {why}\n")
    asked = {name: values[-1] for name, values in parse_qs(query).items()}
    snapshot, now = pages.snapshot(), pages.now()
    try:
        found = lookup.find(snapshot, asked["target"]) if "target" in asked else None
    except KvmtraceError as error:
        said = f"{error.message}\n" + (f"hint: {error.hint}\n" if error.hint else "")
        return text(HTTPStatus.NOT_FOUND, said)
    if asked.get("format") == "json":
        return _json(explain_screen.as_objects(found, snapshot, now))
    showing = explain.Showing(
        now=now,
        stamp=Stamp(__version__, f"serve, pid {os.getpid()}"),
        evidence=asked.get("evidence") == "1",
        command="",
        bundle="kvmtrace bundle -o case.tar.gz",
    )
    lines = (
        explain_screen.of_all(snapshot, showing)
        if found is None
        else explain_screen.of_target(found, snapshot, showing)
    )
    return text(HTTPStatus.OK, "".join(f"{plain(line).rstrip()}\n" for line in lines))
