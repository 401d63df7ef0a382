"""What a VMM did after it was notified of poison: a pure function from evidence to verdict.

``looping``: the same vCPU is notified of the same page again and again, now. ``exited``: the VM is
gone. ``stopped``: the notified vCPU no longer enters KVM_RUN. ``handled``: it ran on and was not
notified of that page again. ``unknown``: the evidence supports none of these.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmtrace.events import LAST_NS
from kvmtrace.facts import Finding, FindingKind
from kvmtrace.model import Notification, Verdict, VerdictWord

_SECOND = 1_000_000_000

# A vCPU notified this often of one gfn was re-entered on it without anything being mended. One
# notification per vCPU is the rule; a signal that races with the exit, or a retry, adds one or two.
LOOPING_AFTER = 4

# A loop is over after this long without a notification; a slower one after three intervals.
LOOP_OVER_NS = 10 * _SECOND
_INTERVALS = 3

# Earlier than this, a vCPU in KVM_RUN may not have come back to the page yet.
SETTLED_NS = 3 * _SECOND // 2

# This many samples in a row show that a vCPU stays outside KVM_RUN; one may be ordinary I/O.
_ASLEEP_SAMPLES = 2

# A thread that waits may wake up now and then. With more CPU time than this between two samples it
# does something, in KVM_RUN or not.
IDLE_NS = 100_000


@dataclass(frozen=True, slots=True)
class VcpuSample:
    """State of a vCPU's thread after its last notification; see ``events.VcpuState``."""

    ts: int
    tid: int
    vcpu: int | None
    state: str
    ran_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known of one VM that was notified of one page; ``now``: the model's time.

    ``released``: addresses at which it no longer has the page.
    """

    vm: int
    now: int
    notifications: tuple[Notification, ...]
    samples: tuple[VcpuSample, ...] = ()
    gone_ts: int | None = None
    released: tuple[int, ...] = ()


def has_looped(one: Notification) -> bool:
    """Whether a vCPU was notified so often that nothing can have been mended in between."""
    return one.repeats >= LOOPING_AFTER


def is_looping(one: Notification, now: int) -> bool:
    """Whether a vCPU still is notified again and again."""
    return has_looped(one) and now <= _loop_end(one)


def _loop_end(one: Notification) -> int:
    """When a loop is over without a further notification."""
    interval = (one.last_ts - one.first_ts) // max(1, one.count - 1)
    return one.last_ts + max(LOOP_OVER_NS, _INTERVALS * interval)


def verdict_until(evidence: Evidence) -> int:
    """Until when the verdict is the same unless something happens."""
    ends = [_loop_end(one) for one in evidence.notifications if is_looping(one, evidence.now)]
    if not evidence.samples:
        settled = max(one.last_ts for one in evidence.notifications) + SETTLED_NS
        if settled > evidence.now:
            ends.append(settled - 1)
    return min(ends, default=LAST_NS)


def judge(evidence: Evidence) -> Verdict:
    """The verdict on one VM, with what it rests on, most important first."""
    first = min(one.first_ts for one in evidence.notifications)
    last = max(one.last_ts for one in evidence.notifications)
    loops = [one for one in evidence.notifications if has_looped(one)]
    now = [one for one in loops if is_looping(one, evidence.now)]

    if evidence.gone_ts is not None:
        gone = Finding(
            FindingKind.VM_GONE,
            after_ns=evidence.gone_ts - first,
            since_last_ns=evidence.gone_ts - last,
        )
        past = [_loop(FindingKind.LOOPED, one) for one in loops]
        return Verdict(evidence.vm, VerdictWord.EXITED, (gone, *past))
    past = [_loop(FindingKind.LOOP_ENDED, one) for one in loops if one not in now]
    if now:
        current = [_loop(FindingKind.LOOPS, one) for one in now]
        return Verdict(evidence.vm, VerdictWord.LOOPING, (*current, *past))
    word, findings = _by_samples(evidence)
    sampled_until = max((sample.ts for sample in evidence.samples), default=evidence.now)
    early = word == VerdictWord.UNKNOWN and sampled_until - last < SETTLED_NS
    return Verdict(evidence.vm, word, (*findings, *past), early)


def _by_samples(evidence: Evidence) -> tuple[VerdictWord, list[Finding]]:
    threads: dict[int, list[VcpuSample]] = {}
    for sample in evidence.samples:
        threads.setdefault(sample.tid, []).append(sample)
    stopped, ran_on, unclear = [], [], []
    for samples in threads.values():
        last = samples[-1]
        after = last.ts - _notified_ts(evidence, last)
        asleep = [sample.state == "outside" for sample in samples[-_ASLEEP_SAMPLES:]]
        if last.state == "gone":
            stopped.append(_found(FindingKind.THREAD_ENDED, samples, after))
        elif len(asleep) == _ASLEEP_SAMPLES and all(asleep):
            if (last.ran_ns or 0) < IDLE_NS:
                stopped.append(_found(FindingKind.ASLEEP, samples, after))
            elif evidence.released:
                ran_on.append(_found(FindingKind.MENDED_BETWEEN, samples, after))
            else:
                unclear.append(_found(FindingKind.AWAKE_BETWEEN, samples, after))
        elif last.state in ("running", "waiting") and after >= SETTLED_NS:
            ran_on.append(_found(FindingKind.RAN_ON, samples, after))
        else:
            unclear.append(_found(FindingKind.TOO_EARLY, samples, after))
    if stopped:
        return VerdictWord.STOPPED, [*stopped, *ran_on, *unclear]
    if ran_on and not unclear:
        mended = [Finding(FindingKind.PAGE_REPLACED, hva=hva) for hva in evidence.released]
        return VerdictWord.HANDLED, [*ran_on, Finding(FindingKind.NOT_NOTIFIED_AGAIN), *mended]
    if unclear:
        return VerdictWord.UNKNOWN, [*unclear, *ran_on]
    if all(one.vcpu is None for one in evidence.notifications):
        return VerdictWord.UNKNOWN, [Finding(FindingKind.NO_VCPU_NOTIFIED)]
    return VerdictWord.UNKNOWN, [Finding(FindingKind.NO_SAMPLE)]


def _notified_ts(evidence: Evidence, sample: VcpuSample) -> int:
    of_vcpu = [one.last_ts for one in evidence.notifications if one.vcpu == sample.vcpu]
    return max(of_vcpu or [one.last_ts for one in evidence.notifications])


def _loop(kind: FindingKind, one: Notification) -> Finding:
    return Finding(kind, one.vcpu, count=one.count, within_ns=one.last_ts - one.first_ts)


def _found(kind: FindingKind, samples: list[VcpuSample], after_ns: int) -> Finding:
    """What was found of a thread."""
    last = samples[-1]
    ran = [sample.ran_ns for sample in samples if sample.ran_ns is not None]
    cpu_ns = sum(ran) if ran else None
    return Finding(kind, last.vcpu, last.tid, last.state, after_ns=after_ns, cpu_ns=cpu_ns)
