"""What ``serve`` answers over HTTP: metrics, health, and pages for people.

On the Unix socket also what is in ``local_pages``. TCP never offers that: the permissions of the
socket, and nothing else, decide who may read the log of other people's guests.
"""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from http import HTTPStatus
from typing import NamedTuple

from kvmtrace.errors import KvmtraceError
from kvmtrace.linux import clock
from kvmtrace.model import Snapshot
from kvmtrace.views.web import incident_page, landing
from kvmtrace.views.web.answers import Answer, Headers, Shared, Tree, text
from kvmtrace.views.web.metrics import (
    DEFAULT_MAX_VMS,
    FALLBACK_KINDS,
    Exporter,
    Kinds,
    Reader,
    Registry,
    Snapshots,
)
from kvmtrace.views.web.server import Route

# Seconds since the source was last read after which /-/healthy fails. It is read every 0.25 s.
STALE_SECONDS = 5.0

# All requests within this time get the same snapshot; seconds.
SNAPSHOT_SECONDS = 1.0


class Recent:
    """A snapshot that is at most ``SNAPSHOT_SECONDS`` old."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._take = snapshot
        self._lock = threading.Lock()
        self._taken: tuple[Snapshot, float] | None = None

    def snapshot(self) -> Snapshot:
        with self._lock:
            now = time.monotonic()
            if self._taken is None or now - self._taken[1] >= SNAPSHOT_SECONDS:
                self._taken = None
                self._taken = self._take(), now
            return self._taken[0]


class Pages:
    """The pages of a session, for every listener: an answer is made once for all who ask.

    ``now``: ns since the epoch, by the clock that stamps the session's events. ``dropped``:
    connections that the server gave up. ``hooks``: as in ``metrics.Registry``. ``is_ready``: set
    once the source is watched.
    """

    def __init__(
        self,
        session: Snapshots,
        dropped: Mapping[str, int],
        *,
        kinds: Kinds = lambda: FALLBACK_KINDS,
        max_vms: int = DEFAULT_MAX_VMS,
        now: Callable[[], int] = clock.now_ns,
        hooks: Mapping[str, int] | None = None,
    ) -> None:
        self.is_ready = True
        self.now = now
        self._session = session
        self._recent = Recent(session.snapshot)
        exporter = Exporter(self._recent.snapshot, kinds=kinds, max_vms=max_vms)
        self._registry = Registry(exporter, session, dropped, hooks)

    def routes(self) -> dict[str, Route]:
        """What every client may ask for, by path."""
        return {
            "/metrics": Shared(self._metrics, _Format.asked_for),
            "/-/healthy": self._healthy,
            "/-/ready": self._ready,
            "/": Shared(self._landing_page),
            "/incident/": Tree(self._incident),
        }

    def snapshot(self) -> Snapshot:
        """A snapshot that is at most a second old. Raises what ended the source."""
        return self._recent.snapshot()

    def failure(self) -> str | None:
        """Why the source is not being read; None if it is."""
        try:
            if isinstance(self._session, Reader):
                age = self._session.age()
            else:
                self._recent.snapshot()
                age = 0.0
        except BaseException as error:
            return _reason(error)
        if age > STALE_SECONDS:
            return f"the source was last read {age:.0f} s ago"
        return None

    def _metrics(self, variant: Hashable) -> Answer:
        assert isinstance(variant, _Format)
        return variant.answer(self._registry.text(as_openmetrics=variant.openmetrics))

    def _healthy(self, _: Headers) -> Answer:
        if (why := self.failure()) is not None:
            return text(HTTPStatus.SERVICE_UNAVAILABLE, f"not healthy: {why}\n")
        return text(HTTPStatus.OK, "kvmtrace is healthy\n")

    def _ready(self, _: Headers) -> Answer:
        why = self.failure() if self.is_ready else "it starts or ends"
        if why is not None:
            return text(HTTPStatus.SERVICE_UNAVAILABLE, f"not ready: {why}\n")
        return text(HTTPStatus.OK, "kvmtrace is ready\n")

    def _landing_page(self, _: Hashable) -> Answer:
        if (why := self.failure()) is not None:
            return text(HTTPStatus.SERVICE_UNAVAILABLE, landing.render_failure(why), "text/html")
        return text(HTTPStatus.OK, landing.render(self.snapshot(), self.now()), "text/html")

    def _incident(self, name: str) -> Answer:
        if (why := self.failure()) is not None:
            return text(HTTPStatus.SERVICE_UNAVAILABLE, landing.render_failure(why), "text/html")
        snapshot = self.snapshot()
        if (incident := snapshot.incident(name)) is not None:
            page = incident_page.render(incident, snapshot, self.now())
            return text(HTTPStatus.OK, page, "text/html")
        return text(HTTPStatus.NOT_FOUND, incident_page.render_unknown(name), "text/html")


class _Format(NamedTuple):
    """The form in which metrics are written."""

    openmetrics: bool
    gzip: bool

    @classmethod
    def asked_for(cls, headers: Headers) -> _Format:
        """OpenMetrics if the client accepts a version that prometheus_client writes."""
        kinds = _parts(headers.get("accept", ""))
        encodings = _parts(headers.get("accept-encoding", ""))
        return cls(
            any(
                kind == "application/openmetrics-text"
                and given.get("version", "1.0.0") in ("0.0.1", "1.0.0")
                for kind, given in kinds
            ),
            any(name == "gzip" and given.get("q") not in ("0", "0.0") for name, given in encodings),
        )

    def answer(self, body: bytes) -> Answer:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        if self.openmetrics:
            kind = "application/openmetrics-text; version=1.0.0; charset=utf-8"
        if self.gzip:
            return Answer(HTTPStatus.OK, gzip.compress(body, 1), kind, "gzip")
        return Answer(HTTPStatus.OK, body, kind)


def _parts(header: str) -> Iterator[tuple[str, dict[str, str]]]:
    """``a;x=1, b`` → ("a", {"x": "1"}), ("b", {})."""
    for part in header.split(","):
        name, *given = (word.strip() for word in part.split(";"))
        pairs = (word.partition("=") for word in given)
        yield name.lower(), {key.strip().lower(): value.strip(' "') for key, _, value in pairs}


def _reason(failure: BaseException) -> str:
    """What ended the source, in one line."""
    if isinstance(failure, KvmtraceError):
        return failure.message
    return f"{type(failure).__name__}: {failure}".splitlines()[0]
