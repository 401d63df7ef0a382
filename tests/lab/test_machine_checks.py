"""Machine checks as a real kernel traces them, judged by its own rules for its CPU (here AMD's)."""

from __future__ import annotations

import functools

import pytest

from tests.lab.drive import Line, following
from tests.lab.machine import Machine

pytestmark = pytest.mark.lab

INJECT = "/sys/kernel/debug/mce-inject"
UMC, LS = 0x9600150F00, 0xB000000000
POISON = 1 << 43
# MCi_STATUS: valid, enabled, MISC and address valid; a memory error
CORRECTED = 0x9C0000000000011B


def injected(machine: Machine, bank: int, status: int, addr: int, ipid: int) -> None:
    said = {"flags": "sw", "cpu": 1, "status": status, "misc": 0x8C, "addr": addr, "ipid": ipid}
    writes = [f"echo {value} > {INJECT}/{name}" for name, value in said.items()]
    machine.run(" && ".join([*writes, f"echo {bank} > {INJECT}/bank"]), check=True)


def _at(addr: int, lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.get("addr") == addr]


@pytest.mark.parametrize("source", ["bpf", "ftrace"])
def test_what_an_address_and_a_socket_are(machine: Machine, source: str) -> None:
    cases = (  # bank, status, IPID; the address is physical; whose the socket is
        (15, CORRECTED, UMC, False, "memory"),
        (0, CORRECTED, LS, False, None),
        (0, CORRECTED | POISON | 1 << 61, LS, True, "consumer"),
        (9, CORRECTED | POISON, 0, True, None),
    )
    with following(machine, source) as (watch,):
        for number, (bank, status, ipid, _, _) in enumerate(cases):
            addr = 0x123456000 + 0x1000 * number
            injected(machine, bank, status, addr, ipid)
            watch.until(functools.partial(_at, addr), f"machine check {number}")
        lines = watch.lines("mce")
    assert len(lines) == len(cases)
    for number, (line, case) in enumerate(zip(lines, cases, strict=True)):
        bank, status, ipid, physical, at = case
        addr = 0x123456000 + 0x1000 * number
        assert (line["addr"], line.get("pfn")) == (addr, addr >> 12 if physical else None)
        assert (line["bank"], line["cpu"], line["status"]) == (bank, 1, status)
        assert (line.get("ipid"), line.get("at"), line.get("fru")) == (ipid or None, at, None)
