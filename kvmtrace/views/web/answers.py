"""What a server answers with, and how costly answers are made once for all who ask.

One Python thread runs at a time: while an answer is made, events are not read. Costly answers are
therefore made seldom, however often clients ask and by however many names.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar

from kvmtrace.bounded import BoundedDict

# How long one costly answer is sent to all clients: long enough that making answers takes at most a
# fiftieth of the time, which the reader lacks (one Python thread runs at a time).
KEEP_SECONDS = 1.0
MAX_KEEP_SECONDS = 5.0
_KEEP_PER_COST = 50

# Of a ``Tree``: answers that are kept, and names that wait for theirs.
KEPT_NAMES = 16
WAITING_NAMES = 8

Headers = Mapping[str, str]
"""Values of headers by their names in lower case."""


@dataclass(frozen=True)
class Answer:
    """An HTTP response. ``kind`` and ``encoding``: Content-Type and Content-Encoding."""

    status: HTTPStatus
    body: bytes
    kind: str = "text/plain; charset=utf-8"
    encoding: str | None = None

    def headers(self) -> dict[str, str]:
        found = {
            "Content-Type": self.kind,
            "Content-Length": str(len(self.body)),
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
        }
        if self.encoding:
            found["Content-Encoding"] = self.encoding
        if self.status == HTTPStatus.METHOD_NOT_ALLOWED:
            found["Allow"] = "GET, HEAD"
        if self.status == HTTPStatus.UNAUTHORIZED:
            found["WWW-Authenticate"] = "Basic"
        return found


def text(status: HTTPStatus, body: str, kind: str = "text/plain") -> Answer:
    """An answer in UTF-8."""
    return Answer(status, body.encode("utf-8", "replace"), f"{kind}; charset=utf-8")


Asked = TypeVar("Asked")


def _made(make: Callable[[Asked], Answer], asked: Asked) -> tuple[Answer, float]:
    """The answer, or what failed, and the seconds of CPU time that it took."""
    began = time.thread_time()
    try:
        answer = make(asked)
    except Exception as error:
        answer = text(HTTPStatus.INTERNAL_SERVER_ERROR, f"internal error: {type(error).__name__}\n")
    return answer, time.thread_time() - began


class Shared:
    """A route with costly answers: one is sent to all clients that ask within a second.

    ``variant``: the part of the headers that the answer depends on. ``make``: makes the answer for
    it, in a thread of its own.
    """

    def __init__(
        self,
        make: Callable[[Hashable], Answer],
        variant: Callable[[Headers], Hashable] = lambda headers: None,
    ) -> None:
        self._make = make
        self._variant = variant
        self._kept: dict[Hashable, tuple[asyncio.Future[Answer], float]] = {}

    async def answer(self, headers: Headers) -> Answer:
        """The answer that is cached or being made, else a new one."""
        variant = self._variant(headers)
        kept = self._kept.get(variant)
        if kept is None or (kept[0].done() and time.monotonic() >= kept[1]):
            future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            work = threading.Thread(
                target=self._work, args=(variant, future), name="kvmtrace-answer", daemon=True
            )
            try:
                work.start()
            except RuntimeError:  # no thread can be started (TasksMax)
                return text(HTTPStatus.SERVICE_UNAVAILABLE, "no thread to answer with\n")
            kept = self._kept[variant] = future, 0.0
        # A client that leaves must not cancel the answer for the others.
        return await asyncio.shield(kept[0])

    def _work(self, variant: Hashable, future: asyncio.Future[Answer]) -> None:
        began = time.monotonic()
        answer, cost = _made(self._make, variant)
        until = began + min(MAX_KEEP_SECONDS, max(KEEP_SECONDS, _KEEP_PER_COST * cost))

        def done() -> None:
            self._kept[variant] = future, until
            future.set_result(answer)

        with contextlib.suppress(RuntimeError):  # the server was closed meanwhile
            future.get_loop().call_soon_threadsafe(done)


class Tree:
    """Costly answers by name: ``make(name)``, in a thread of its own.

    The name is what is directly below the path of the route, if that ends in a slash, else the
    query.

    Clients choose the names. One answer is made at a time, and after each nothing is made for fifty
    times as long, so that a client with many names costs the reader no more than one with a single
    name. An answer is kept as in ``Shared``.
    """

    def __init__(self, make: Callable[[str], Answer]) -> None:
        self._make = make
        self._kept: BoundedDict[str, tuple[Answer, float]] = BoundedDict(KEPT_NAMES)
        self._waiting: dict[str, asyncio.Future[Answer]] = {}
        self._busy = False

    async def answer(self, name: str) -> Answer:
        """The answer that is kept or being made, else a new one; 503 if too many names wait."""
        kept = self._kept.get(name)
        if kept is not None and time.monotonic() < kept[1]:
            return kept[0]
        future = self._waiting.get(name)
        if future is None:
            if len(self._waiting) >= WAITING_NAMES:
                return text(HTTPStatus.SERVICE_UNAVAILABLE, "busy: try again in some seconds\n")
            future = self._waiting[name] = asyncio.get_running_loop().create_future()
            self._next()
        # A client that leaves must not cancel the answer for the others.
        return await asyncio.shield(future)

    def _next(self) -> None:
        """Begin with the answer that was asked for first, unless one is being made."""
        if self._busy or not self._waiting:
            return
        name, future = next(iter(self._waiting.items()))
        work = threading.Thread(
            target=self._work, args=(name, future), name="kvmtrace-answer", daemon=True
        )
        self._busy = True
        try:
            work.start()
        except RuntimeError:  # no thread can be started (TasksMax)
            answer = text(HTTPStatus.SERVICE_UNAVAILABLE, "no thread to answer with\n")
            self._done(name, future, answer, pause=0.0)

    def _work(self, name: str, future: asyncio.Future[Answer]) -> None:
        answer, cost = _made(self._make, name)
        pause = min(MAX_KEEP_SECONDS, _KEEP_PER_COST * cost)
        with contextlib.suppress(RuntimeError):  # the server was closed meanwhile
            future.get_loop().call_soon_threadsafe(self._done, name, future, answer, pause)

    def _done(
        self, name: str, future: asyncio.Future[Answer], answer: Answer, pause: float
    ) -> None:
        del self._waiting[name]
        self._kept.renew(name, (answer, time.monotonic() + max(KEEP_SECONDS, pause)))
        future.set_result(answer)
        future.get_loop().call_later(pause, self._rested)

    def _rested(self) -> None:
        self._busy = False
        self._next()
