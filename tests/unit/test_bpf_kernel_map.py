"""Maps and the ring buffer, in this kernel: read, written, and read whole."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvmtrace.sources.bpf import kernel_map
from kvmtrace.sources.bpf.compiler import MapDefinition
from kvmtrace.sources.bpf.kernel_map import KernelMap
from kvmtrace.sources.bpf.system_call import bpf

HASH, ARRAY = 1, 2


@pytest.fixture
def rows() -> Iterator[KernelMap]:
    """Four bytes to eight, room for 8."""
    try:
        made = KernelMap("rows", MapDefinition(HASH, 4, 8, 8, 0))
    except OSError as error:
        pytest.skip(f"this kernel does not let us make maps: {error}")
    yield made
    made.close()


def key(number: int) -> bytes:
    return number.to_bytes(4, "little")


def value(number: int) -> bytes:
    return number.to_bytes(8, "little")


def test_a_row_comes_and_goes(rows: KernelMap) -> None:
    assert rows.lookup(key(1)) is None
    rows.update(key(1), value(7))
    rows.update(key(1), value(8))
    assert rows.lookup(key(1)) == value(8)
    rows.delete(key(1))
    rows.delete(key(1))  # not there any more: no error
    assert rows.lookup(key(1)) is None


@pytest.mark.parametrize("batches", [True, False])
def test_all_rows(rows: KernelMap, batches: bool) -> None:
    rows._batches = batches
    assert list(rows.rows()) == []
    wanted = {key(number): value(number) for number in range(8)}
    for one, eight in wanted.items():
        rows.update(one, eight)
    for _ in range(2):
        assert sorted(rows.rows()) == sorted(wanted.items())
    rows.delete(key(3))
    assert len(list(rows.rows())) == 7


def test_a_call_that_the_kernel_lacks_is_tried_once(
    rows: KernelMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def older(command: int, attributes: kernel_map._Element) -> int:
        if isinstance(attributes, kernel_map._Batch):
            asked.append(command)
            raise OSError(22, "Invalid argument")
        return bpf(command, attributes)

    monkeypatch.setattr(kernel_map, "bpf", older)
    rows.update(key(1), value(1))
    assert list(rows.rows()) == list(rows.rows()) == [(key(1), value(1))]
    assert len(asked) == 1


@pytest.mark.parametrize("error", [0, 28])
def test_half_a_map_is_read_again(
    rows: KernelMap, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    asked: list[int] = []

    def busy(command: int, attributes: kernel_map._Element) -> int:
        if isinstance(attributes, kernel_map._Batch):
            asked.append(command)
            if error:
                raise OSError(error, "No space left on device")
            return 0
        return bpf(command, attributes)

    monkeypatch.setattr(kernel_map, "bpf", busy)
    rows.update(key(1), value(1))
    assert list(rows.rows()) == list(rows.rows()) == [(key(1), value(1))]
    assert len(asked) == 2


def test_a_full_map_says_so(rows: KernelMap) -> None:
    for number in range(8):
        rows.update(key(number), value(0))
    with pytest.raises(OSError, match=os.strerror(7)):
        rows.update(key(9), value(0))


def test_keys_have_their_size(rows: KernelMap) -> None:
    with pytest.raises(ValueError, match="a key of 3 bytes, not 4"):
        rows.lookup(b"abc")
