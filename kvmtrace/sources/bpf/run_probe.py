"""The probe ``run``: one program for all returns of KVM_RUN, on kvm:kvm_userspace_exit.

Each exit of each VM runs it, so it is attached once, in the cheapest way in which this kernel does
not skip it:

- on the raw tracepoint, where such programs run with preemption off;
- as a trace event (perf's), where they are preempted, and skipped meanwhile in the other threads of
  that CPU. A program on a trace event is not preempted. It is skipped while a process on its CPU
  reads or writes a map by bpf(2) and is preempted in the middle (kernel/bpf/syscall.c,
  bpf_disable_instrumentation). kvmtrace itself does so when something was counted. Until it has
  read nothing for a minute, copies on the raw tracepoint handle what the program is skipped for;
- by copies on the raw tracepoint, where it can be no trace event (no tracefs).
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable

from kvmtrace.linux.tracefs import mount
from kvmtrace.probes import USERSPACE_EXIT, Probe
from kvmtrace.sources.bpf import attach_errors
from kvmtrace.sources.bpf.attach_errors import AttachFailure
from kvmtrace.sources.bpf.loader import Loader

GUARD_SECONDS = 60.0

_PLACES = {"reason": (8, 4), "errno": (12, 4)}  # struct userspace_exit in bpf/common.c


class RunProbe:
    """``state``: what became of ``attach``. ``programs``: descriptors of its programs.

    ``skips_raw``: this kernel may skip a program on a raw tracepoint. The programs are closed with
    ``loader``.
    """

    def __init__(self, loader: Loader, *, skips_raw: bool) -> None:
        self.programs: list[int] = []
        self._loader, self._skips_raw = loader, skips_raw
        self.state = Probe("run", False)
        self._copies = 0  # on the raw tracepoint, or a trace event that stands for the first
        self._guard: list[int] = []
        self._guard_until = 0.0

    @property
    def may_miss(self) -> bool:
        """Whether there is no copy that handles what another one is skipped for."""
        return self._copies <= 1

    def attach(self) -> Probe:
        """Attach it, if that can be done; its ``state``."""
        if self._skips_raw:
            failed, via = self._try("tracepoint", self._attach_event), "tracepoint"
            if failed is not None:
                failed, via = self._attach_copy(), "raw_tracepoint"
                self._attach_copies()
        else:
            failed, via = self._attach_copy(), "raw_tracepoint"
        if failed is None:
            self.state = Probe("run", True, USERSPACE_EXIT, via)
        else:
            why, detail = failed.why, failed.detail
            self.state = Probe("run", False, USERSPACE_EXIT, why=why, detail=detail)
        return self.state

    def guard(self) -> None:
        """Counters are about to be read."""
        if self.state.via == "tracepoint":
            self._guard_until = max(self._guard_until, time.monotonic() + GUARD_SECONDS)
            self._guard += self._attach_copies()

    def missed(self) -> None:
        """It was skipped without a copy: keep copies from now on, whatever the reason."""
        self._attach_copies()
        self._guard_until = math.inf

    def end_guard(self) -> None:
        """Detach the copies if they are no longer needed."""
        if self._guard and time.monotonic() >= self._guard_until:
            for program in self._guard:
                self.programs.remove(program)
                self._loader.detach(program)
            self._copies -= len(self._guard)
            self._guard.clear()

    def _attach_event(self) -> int:
        root = mount.tracefs()
        text = mount.event_format(USERSPACE_EXIT, root) if root else ""
        number, places = mount.event_id(text), mount.field_places(text)
        if number is None or any(places.get(name) != place for name, place in _PLACES.items()):
            raise FileNotFoundError(errno.ENOENT, "tracefs does not show this event as expected")
        return self._loader.attach_tracepoint("te_run", number)

    def _attach_copies(self) -> list[int]:
        """Those that are not there yet; none if the first program is not."""
        before = len(self.programs)
        while 0 < self._copies < self._loader.copies("tp_run", "run"):
            if self._attach_copy() is not None:
                break
        return self.programs[before:]

    def _attach_copy(self) -> AttachFailure | None:
        event, copy = USERSPACE_EXIT.partition(":")[2], self._copies
        return self._try(
            "raw_tracepoint",
            lambda: self._loader.attach_raw_tracepoint("tp_run", event, copy=copy),
        )

    def _try(self, way: str, attach: Callable[[], int]) -> AttachFailure | None:
        try:
            self.programs.append(attach())
        except OSError as error:
            return attach_errors.explain(way, error)
        self._copies += 1
        return None
