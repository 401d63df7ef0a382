"""Counters: rows that changed since they were read last."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvmtrace.sources.bpf import maps as bpf_maps
from kvmtrace.sources.bpf.exits import ExitCount, ExitKeyRecord
from kvmtrace.sources.bpf.maps import Maps


class Rows(dict[bytes, bytes]):
    """A map of the kernel's."""

    fd, definition = 42, SimpleNamespace(max_entries=4096)

    def rows(self) -> Iterator[tuple[bytes, bytes]]:
        yield from self.items()

    def lookup(self, key: bytes) -> bytes | None:
        return self.get(key)

    def delete(self, key: bytes) -> None:
        self.pop(key, None)


def made(monkeypatch: pytest.MonkeyPatch, **maps: Any) -> Maps:
    monkeypatch.setattr(bpf_maps, "RingBuffer", lambda *_: None)
    return Maps({"ring": Rows(), **maps})  # type: ignore[dict-item]


def rows(*pairs: tuple[ctypes.Structure, ctypes.Structure]) -> Rows:
    return Rows({bytes(key): bytes(count) for key, count in pairs})


def test_rows_that_did_not_change_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, rest = (ExitKeyRecord(vcpu=vcpu) for vcpu in (1, 2, 3))
    exits = rows((one, ExitCount(1)), (other, ExitCount(1)))
    overflow = rows((rest, ExitCount(7)))
    maps = made(monkeypatch, exits=exits, overflow=overflow)

    def read() -> list[tuple[int, int]]:
        return [(key.vcpu, count.total) for key, count in maps.exits()]

    assert read() == [(1, 1), (2, 1), (3, 7)]
    assert read() == []
    exits[bytes(other)] = bytes(ExitCount(2))
    assert read() == [(2, 2)]
    # Once deleted, a row with the same key is a new one. One that is not there is no error.
    maps.forget_exits([other, rest, ExitKeyRecord(vcpu=4)])
    assert (list(exits), list(overflow)) == ([bytes(one)], [])
    exits[bytes(other)] = bytes(ExitCount(2))
    assert read() == [(2, 2)]


def test_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    at = 0xFFFF800000000000
    places = {place.to_bytes(4, "little"): (10 + place).to_bytes(8, "little") for place in range(3)}
    maps = made(
        monkeypatch,
        activity=Rows({bytes(4): (7).to_bytes(8, "little")}),
        lost=Rows(places),
        generation=Rows({at.to_bytes(8, "little"): (3).to_bytes(8, "little")}),
    )
    assert (maps.activity(), maps.lost()) == (7, [10, 11, 12])
    assert (maps.generation(at), maps.generation(at + 1)) == (3, 0)


def test_whoever_wants_to_know_knows_before_counters_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bpf_maps, "RingBuffer", lambda *_: None)
    exits = Rows()
    parts: Any = {"ring": Rows(), "exits": exits, "overflow": Rows()}
    maps = Maps(parts, lambda: exits.update(rows((ExitKeyRecord(), ExitCount(1)))))
    assert [count.total for _, count in maps.exits()] == [1]
