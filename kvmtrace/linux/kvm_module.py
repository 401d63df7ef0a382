"""Which of kvm's modules are loaded, and whether they are still the same ones."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection

_KVM = "/sys/module/kvm"
_MODULES = ("kvm", "kvm_amd", "kvm_intel")

SETTLE_SECONDS = 10.0
"""How long to wait for kvm's modules to stay as they are."""


def load_number() -> int | None:
    """Return a number that changes when kvm is loaded again; None while it is not loaded."""
    try:
        number = os.stat(_KVM).st_ino
    except OSError:
        return 0 if os.path.exists("/dev/kvm") else None
    try:
        with open(f"{_KVM}/initstate") as file:
            return number if file.read().strip() == "live" else None
    except OSError:
        # Built in: the directory has parameters only. Just unloaded: there is no directory.
        return number if os.path.isdir(_KVM) else None


def loaded() -> tuple[str, ...]:
    """The modules that are loaded, each with a number that changes when it is loaded again."""
    found = []
    for module in _MODULES:
        with contextlib.suppress(OSError):
            number = os.stat(f"/sys/module/{module}").st_ino
            if _is_live(module):
                found.append(f"{module}:{number}")
    return tuple(found)


class Changing(Exception):
    """kvm is being loaded or unloaded: what is read now belongs to neither state."""


class Settling:
    """Waits until kvm's modules stay as they are; call ``is_over`` now and then.

    They come and go one after the other. Programs that are compiled for a state in between seem to
    fit and have to be made anew, and events are lost meanwhile.
    """

    def __init__(self) -> None:
        self._seen = loaded()
        self._end = time.monotonic() + SETTLE_SECONDS

    def is_over(self) -> bool:
        """Whether nothing has changed since the last call; True once it is given up."""
        before, self._seen = self._seen, loaded()
        settled = before == self._seen and not is_changing()
        return settled or self.is_given_up

    @property
    def is_given_up(self) -> bool:
        """Whether they have changed for ten seconds."""
        return time.monotonic() >= self._end


def is_changing(has_symbols: Collection[str] = ()) -> bool:
    """Whether a module is being loaded or unloaded.

    ``has_symbols``: modules that /proc/kallsyms shows. It does so before there is anything in /sys
    (kernel/module/main.c, load_module: complete_formation, mod_sysfs_setup).
    """
    return any(
        not _is_live(one) if os.path.exists(f"/sys/module/{one}") else one in has_symbols
        for one in _MODULES
    )


def _is_live(module: str) -> bool:
    """Whether a module is loaded completely and not being unloaded (built in: always)."""
    try:
        with open(f"/sys/module/{module}/initstate") as file:
            return file.read().strip() == "live"
    except FileNotFoundError:
        return True
