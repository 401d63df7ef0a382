"""Whether the kvm module is loaded, and whether it is still the same one."""

from __future__ import annotations

import os

_KVM = "/sys/module/kvm"


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
