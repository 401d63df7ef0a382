"""Basic auth with passwords that are stored as bcrypt hashes.

A comparison takes a tenth of a second or more of a CPU, by intent. One is made at a time, in a
thread of its own and without Python's lock, so that guesses cost the reader of events nothing.
A password that was right is known from then on, so a client that scrapes does not wait for guesses.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import threading
from collections.abc import Mapping

import bcrypt

MAX_WAITING = 32
"""Comparisons that wait; further ones are not made."""

# Of a user who does not exist, or it would show in the time that it takes.
_NOBODY = "$2b$10$nCEeY.CwmCU7YIJxFquZmeFlOob/ZgI2RVX3MAFQkv3.ZvGr7cLAy"
_PASSWORD_BYTES = 72  # what bcrypt takes into account


class Busy(Exception):
    """Too many comparisons wait."""


class BasicAuth:
    """Users by name, with their hashes. For one event loop."""

    def __init__(self, users: Mapping[str, str]) -> None:
        self._users = dict(users)
        self._right: set[bytes] = set()
        self._waiting = 0
        self._turn = asyncio.Lock()

    async def admits(self, authorization: str) -> bool:
        """Whether a header Authorization has a user and the right password. Raises Busy."""
        user, password = _user_and_password(authorization)
        if user is None:
            return False
        password = password[:_PASSWORD_BYTES]
        stored = self._users.get(user)
        known = hashlib.sha256(b"\0".join((user.encode(), (stored or "").encode(), password)))
        if known.digest() in self._right:
            return True
        if self._waiting >= MAX_WAITING:
            raise Busy
        self._waiting += 1
        try:
            async with self._turn:
                is_right = await _compared(password, stored or _NOBODY) and stored is not None
        finally:
            self._waiting -= 1
        if is_right:
            self._right.add(known.digest())
        return is_right


def _user_and_password(authorization: str) -> tuple[str | None, bytes]:
    kind, _, encoded = authorization.partition(" ")
    if kind.lower() != "basic":
        return None, b""
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        return (user.decode() if colon else None), password
    except (binascii.Error, ValueError):
        return None, b""


async def _compared(password: bytes, stored: str) -> bool:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bool] = loop.create_future()

    def settle(is_right: bool) -> None:
        if not done.done():
            done.set_result(is_right)

    def work() -> None:
        is_right = False
        with contextlib.suppress(ValueError):  # a NUL in it, for instance
            is_right = bcrypt.checkpw(password, stored.encode())
        with contextlib.suppress(RuntimeError):  # the server was closed meanwhile
            loop.call_soon_threadsafe(settle, is_right)

    threading.Thread(target=work, name="kvmtrace-bcrypt", daemon=True).start()
    # The next comparison begins when this one has ended, also if its client leaves.
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        with contextlib.suppress(asyncio.CancelledError):
            await done
        raise
