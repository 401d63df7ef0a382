"""What a VMM did after it was notified of poison: a pure function from evidence to verdict.

``looping``: the same vCPU is notified of the same page again and again, now. ``exited``: the VM is
gone. ``stopped``: the notified vCPU no longer enters KVM_RUN. ``handled``: it ran on and was not
notified of that page again. ``unknown``: the evidence does not say which.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvmtrace.model import Notification, Verdict

_SECOND = 1_000_000_000

# A vCPU notified this often of one gfn has been re-entered on it without anything being mended: one
# delivery per vCPU is the rule, a signal that raced with the exit or a retry makes it two or three.
LOOPING_AFTER = 4

# A loop is over after so long without a delivery, or after three times its own pace if slower.
LOOP_OVER_NS = 10 * _SECOND
_PACES = 3

# Earlier than this a vCPU that is in KVM_RUN may just not have come back to the page yet.
SETTLED_NS = 3 * _SECOND // 2

# A vCPU asleep outside KVM_RUN at two looks in a row: one alone may be an ordinary exit's I/O.
_LOOKS = 2

# A thread that waits may wake up now and then; with more CPU time than that between two looks it
# does something, be it in KVM_RUN or not.
IDLE_NS = 100_000


@dataclass(frozen=True, slots=True)
class VcpuSample:
    """A vCPU's thread, looked at after its last delivery; see ``events.VcpuState``."""

    ts: int
    tid: int
    vcpu: int | None
    state: str
    ran_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known of one VM that was notified of one page; ``now``: the model's time.

    ``released``: addresses where it had the page and has it no longer.
    """

    vm: int
    now: int
    told: tuple[Notification, ...]
    looks: tuple[VcpuSample, ...] = ()
    gone_ts: int | None = None
    released: tuple[int, ...] = ()


def looped(telling: Notification) -> bool:
    """Whether this vCPU was notified so often that nothing can have been mended in between."""
    return telling.repeats >= LOOPING_AFTER


def loops_now(telling: Notification, now: int) -> bool:
    """Whether it still is."""
    pace = (telling.last_ts - telling.first_ts) // max(1, telling.count - 1)
    return looped(telling) and now - telling.last_ts <= max(LOOP_OVER_NS, _PACES * pace)


def judge(evidence: Evidence) -> Verdict:
    """The verdict on one VM, with what it rests on, most important first."""
    first = min(telling.first_ts for telling in evidence.told)
    last = max(telling.last_ts for telling in evidence.told)
    loops = [telling for telling in evidence.told if looped(telling)]
    now = [telling for telling in loops if loops_now(telling, evidence.now)]
    past = tuple(_loop(telling) + ", then no more" for telling in loops if telling not in now)

    def verdict(word: str, *facts: str) -> Verdict:
        return Verdict(evidence.vm, word, (*facts, *past))

    if evidence.gone_ts is not None:
        past = tuple(_loop(telling) for telling in loops)
        after = _seconds(evidence.gone_ts - first)
        since = (
            "" if first == last else f", {_seconds(evidence.gone_ts - last)} after the last time"
        )
        return verdict("exited", f"the VM was gone {after} after it was first notified{since}")
    if now:
        return verdict("looping", *(_loop(telling, rate=True) for telling in now))
    word, *facts = _by_looks(evidence)
    settled = max((look.ts for look in evidence.looks), default=evidence.now) - last >= SETTLED_NS
    return replace(verdict(word, *facts), early=word == "unknown" and not settled)


def _by_looks(evidence: Evidence) -> tuple[str, ...]:
    threads: dict[int, list[VcpuSample]] = {}
    for look in evidence.looks:
        threads.setdefault(look.tid, []).append(look)
    stopped, ran_on, unclear = [], [], []
    for looks in threads.values():
        last = looks[-1]
        after = last.ts - _told_ts(evidence, last)
        who = f"{_vcpu(last.vcpu)} (thread {last.tid})"
        if last.state == "gone":
            stopped.append(f"{who} has ended, {_seconds(after)} after it was notified")
        elif len(looks) >= _LOOKS and all(look.state == "outside" for look in looks[-_LOOKS:]):
            where = f"{who} sleeps outside KVM_RUN"
            if (last.ran_ns or 0) < IDLE_NS:
                stopped.append(f"{where}, {_seconds(after)} after it was notified")
            elif evidence.released:
                ran_on.append(f"{where} at every look, and ran in between{_cpu(looks)}")
            else:
                unclear.append(f"{where} at every look, but ran in between{_cpu(looks)}")
        elif last.state in ("running", "waiting") and after >= SETTLED_NS:
            where = "in KVM_RUN" if last.state == "waiting" else "running"
            ran_on.append(f"{who} is {where} {_seconds(after)} later{_cpu(looks)}")
        else:
            unclear.append(f"{who} was {last.state} {_seconds(after)} later: too early to judge")
    if stopped:
        return ("stopped", *stopped, *ran_on, *unclear)
    if ran_on and not unclear:
        mended = [f"hva {hva:#x} has no longer that page" for hva in evidence.released]
        return ("handled", *ran_on, "not notified of this page again since", *mended)
    if unclear:
        return ("unknown", *unclear, *ran_on)
    if all(telling.vcpu is None for telling in evidence.told):
        return ("unknown", "no vCPU was notified, only another thread of the VMM")
    return ("unknown", "the vCPU was not looked at after it was notified")


def _told_ts(evidence: Evidence, look: VcpuSample) -> int:
    told = [t.last_ts for t in evidence.told if t.vcpu == look.vcpu]
    return max(told or [telling.last_ts for telling in evidence.told])


def _loop(telling: Notification, *, rate: bool = False) -> str:
    text = f"{_vcpu(telling.vcpu)} was notified {telling.count} times"
    elapsed = telling.last_ts - telling.first_ts
    if elapsed > 0:
        text += f" in {_seconds(elapsed)}"
        if rate:
            text += f", {_round((telling.count - 1) * _SECOND / elapsed)} a second"
    return text


def _cpu(looks: list[VcpuSample]) -> str:
    ran = [look.ran_ns for look in looks if look.ran_ns is not None]
    return f", {_seconds(sum(ran))} of CPU time since" if ran else ""


def _vcpu(vcpu: int | None) -> str:
    return "a thread" if vcpu is None else f"vCPU {vcpu}"


def _seconds(nanoseconds: int) -> str:
    return f"{_round(max(0, nanoseconds) / _SECOND)} s"


def _round(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
