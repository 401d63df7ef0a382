"""From evidence to verdict."""

from __future__ import annotations

import pytest

from kvmtrace.correlate.verdicts import (
    IDLE_NS,
    LOOP_OVER_NS,
    LOOPING_AFTER,
    Evidence,
    VcpuSample,
    judge,
)
from kvmtrace.model import Notification, Verdict
from kvmtrace.views.timeline import finding_text

S = 1_000_000_000


def told(count: int = 1, first: int = 0, last: int = 0, vcpu: int | None = 0) -> Notification:
    return Notification(1, vcpu, count, {}, first, last)


def look(seconds: float, state: str, vcpu: int | None = 0, tid: int = 7) -> VcpuSample:
    return VcpuSample(int(seconds * S), tid, vcpu, state, 1000)


def texts(verdict: Verdict) -> list[str]:
    return [finding_text(finding) for finding in verdict.evidence]


@pytest.mark.parametrize(
    ("looks", "word"),
    [
        ([], "unknown"),
        ([look(0.5, "outside")], "unknown"),
        ([look(0.5, "outside"), look(2, "outside")], "stopped"),
        ([look(0.5, "waiting"), look(2, "outside")], "unknown"),
        ([look(0.5, "gone")], "stopped"),
        ([look(0.5, "running")], "unknown"),  # may not have come back to the page yet
        ([look(0.5, "running"), look(2, "running")], "handled"),
        ([look(0.5, "outside"), look(2, "waiting")], "handled"),
        ([look(2, "running"), look(2, "outside", tid=8), look(5, "outside", tid=8)], "stopped"),
        ([look(2, "running"), look(2, "outside", tid=8)], "unknown"),
        ([look(2, "as never before")], "unknown"),
    ],
)
def test_by_what_was_seen_of_the_vcpus(looks: list[VcpuSample], word: str) -> None:
    assert judge(Evidence(1, 5 * S, (told(),), tuple(looks))).word == word


def test_asleep_at_every_look_but_not_in_between() -> None:
    """A vCPU with short sleeps in its VMM, halted by userspace for instance, has not stopped."""
    looks = tuple(VcpuSample(n * S, 7, 0, "outside", IDLE_NS) for n in (1, 2, 5))
    verdict = judge(Evidence(1, 6 * S, (told(),), looks))
    assert verdict.word == "unknown"
    assert "ran in between" in texts(verdict)[0]
    mended = judge(Evidence(1, 6 * S, (told(),), looks, released=(0x7F0000,)))
    assert mended.word == "handled"


def test_exited_says_how_long_after() -> None:
    verdict = judge(Evidence(1, 9 * S, (told(2, 0, S),), (look(2, "outside"),), gone_ts=3 * S))
    assert verdict.word == "exited"
    assert texts(verdict) == [
        "the VM was gone 3 s after it was first notified, 2 s after the last time"
    ]


def test_looping_has_a_rate_and_an_end() -> None:
    loop = told(LOOPING_AFTER * 100, 0, 4 * S)
    verdict = judge(Evidence(1, 5 * S, (loop,)))
    assert verdict.word == "looping"
    assert texts(verdict) == ["vCPU 0 was notified 400 times in 4 s, 99.8 a second"]
    over = judge(Evidence(1, 4 * S + LOOP_OVER_NS + 1, (loop,), (look(6, "waiting"),)))
    assert over.word == "handled"
    assert texts(over)[-1] == "vCPU 0 was notified 400 times in 4 s, then no more"


def test_a_slow_loop_is_not_over_between_two_rounds() -> None:
    loop = told(5, 0, 4 * 60 * S)
    assert judge(Evidence(1, 5 * 60 * S, (loop,))).word == "looping"
    assert judge(Evidence(1, 8 * 60 * S, (loop,))).word == "unknown"


def test_only_a_warning() -> None:
    verdict = judge(Evidence(1, S, (told(vcpu=None),)))
    assert texts(verdict) == ["no vCPU was notified, only another thread of the VMM"]
