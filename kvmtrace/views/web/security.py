"""Who may ask a server on TCP, and over what: a web configuration, followed as its files change.

A file that changes is read again at the next connection, so that new certificates and users need no
restart. One that became wrong, or would turn TLS or basic auth off, changes nothing, and a line
reports it: a file is also empty while an editor writes it.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus

from kvmtrace.errors import UsageError
from kvmtrace.views.web.answers import Answer, text
from kvmtrace.views.web.basic_auth import BasicAuth, Busy
from kvmtrace.views.web.tls import tls_context
from kvmtrace.views.web.web_config import WebConfig, config_error, read_web_config

_LOOK_SECONDS = 1.0


class Security:
    """The web configuration at ``path``. ``warn`` is called with a line about a change of it."""

    def __init__(self, path: str, warn: Callable[[str], None]) -> None:
        """Raises UsageError."""
        self._path, self._warn = path, warn
        self._next_look = 0.0
        self._take(read_web_config(path))

    def _take(self, config: WebConfig) -> None:
        try:
            context = None if config.tls is None else tls_context(config.tls)
        except ValueError as error:
            raise config_error(self._path, str(error)) from None
        self._config = config
        self.context: ssl.SSLContext | None = context
        """None: plain HTTP."""
        self._auth = BasicAuth(config.users) if config.users else None
        self._bucket = None if config.rate is None else _Bucket(*config.rate)
        self._files = self._states()

    def _states(self) -> list[tuple[int, ...] | None]:
        paths = (self._path, *(self._config.tls.files() if self._config.tls else ()))
        return [_state(path) for path in paths]

    def look(self) -> None:
        """Take a changed file, at most once a second."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_SECONDS
        states = self._states()
        if states == self._files:
            return
        try:
            config = read_web_config(self._path)
            if self._config.tls and not config.tls:
                raise config_error(self._path, "has no TLS any more")
            if self._config.users and not config.users:
                raise config_error(self._path, "has no users any more")
            self._take(config)
        except UsageError as error:
            self._files = states
            self._warn(f"kvmtrace: {error.message}: the former one is in force until a restart")

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every answer."""
        return {name: value for name, value in self._config.headers.items() if value}

    def allows(self, alternative_names: list[str]) -> bool:
        """Whether a client with a certificate for these subjectAltNames may ask."""
        allowed = self._config.tls.client_allowed_sans if self._config.tls else None
        return allowed is None or bool({*allowed} & {*alternative_names})

    async def refusal(self, headers: Mapping[str, str]) -> Answer | None:
        """What to answer instead; None to a client that may ask."""
        if self._bucket is not None and not self._bucket.take():
            return text(HTTPStatus.TOO_MANY_REQUESTS, "too many requests\n")
        if self._auth is None:
            return None
        try:
            if await self._auth.admits(headers.get("authorization", "")):
                return None
        except Busy:
            return text(HTTPStatus.SERVICE_UNAVAILABLE, "busy: try again in some seconds\n")
        return text(HTTPStatus.UNAUTHORIZED, "Unauthorized\n")


class _Bucket:
    """So many requests at once, and from then on one in so many seconds."""

    def __init__(self, seconds: float, burst: int) -> None:
        self._seconds, self._burst = seconds, burst
        self._tokens, self._at = float(burst), time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) / self._seconds)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def _state(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
