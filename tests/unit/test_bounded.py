"""The mapping that forgets its oldest entries."""

from __future__ import annotations

from kvmtrace.bounded import BoundedDict


def test_the_oldest_goes_first_and_is_reported() -> None:
    dropped: list[tuple[int, str]] = []
    known: BoundedDict[int, str] = BoundedDict(2, lambda *entry: dropped.append(entry))
    known[1] = "a"
    known.setdefault(2, "b")
    known[1] = "c"  # it stays the oldest
    known[3] = "d"
    assert dropped == [(1, "c")]
    known.renew(2, "e")
    known |= {4: "f"}
    assert dropped == [(1, "c"), (3, "d")]
    assert list(known.items()) == [(2, "e"), (4, "f")]


def test_what_is_taken_out_is_not_dropped() -> None:
    dropped: list[tuple[int, str]] = []
    known: BoundedDict[int, str] = BoundedDict(1, lambda *entry: dropped.append(entry))
    known[1] = "a"
    assert known.pop(1) == "a"
    known[2] = "b"
    assert not dropped
