"""Machine checks as a real kernel traces them: physical addresses, and whose socket it is.

The CPU is AMD's, without Scalable MCA: mce-inject takes no IPID for it.
"""

from __future__ import annotations

import functools

import pytest

from tests.lab.harness import Line, following
from tests.lab.machine import Machine

pytestmark = pytest.mark.lab

INJECT = "/sys/kernel/debug/mce-inject"
NORTHBRIDGE = 4
POISON, UC, DRAM_ECC = 1 << 43, 1 << 61, 8 << 16
# MCi_STATUS: valid, enabled, MISC and address valid; a memory error
CHECK = 0x9C0000000000011B


def injected(machine: Machine, bank: int, status: int, addr: int) -> None:
    values = {"flags": "sw", "cpu": 1, "status": hex(status), "misc": 0x46, "addr": hex(addr)}
    writes = [f"echo {value} > {INJECT}/{name}" for name, value in values.items()]
    machine.run(" && ".join([*writes, f"echo {bank} > {INJECT}/bank"]), check=True)


def _of(addr: int, lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.get("addr") == addr]


@pytest.mark.parametrize("source", ["bpf", "ftrace"])
def test_what_an_address_and_a_socket_are(machine: Machine, source: str) -> None:
    cases = (  # bank, status, whether the address is physical, what the socket belongs to
        (NORTHBRIDGE, CHECK | DRAM_ECC, True, "memory"),
        (NORTHBRIDGE, CHECK | POISON, False, None),
        (7, CHECK, False, None),
        (7, CHECK | POISON, True, None),
        (7, CHECK | POISON | UC, True, "consumer"),
    )
    with following(machine, source) as (watch,):
        for number, (bank, status, physical, at) in enumerate(cases):
            addr = 0x123456000 + 0x1000 * number
            injected(machine, bank, status, addr)
            at_address = functools.partial(_of, addr)
            (line,) = at_address(watch.until(at_address, f"machine check {number}"))
            assert line.get("pfn") == (addr >> 12 if physical else None), line
            assert line.get("at") == at, line
            assert (line["bank"], line["cpu"], line["status"]) == (bank, 1, status)
            assert "ipid" not in line
            assert "fru" not in line
