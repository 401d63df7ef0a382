"""Interpret machine check registers, whose bits depend on who made the CPU."""

from __future__ import annotations

from dataclasses import replace

from kvmtrace.enrich.stage import Stage
from kvmtrace.events import Event, Mce
from kvmtrace.linux import host, mce
from kvmtrace.linux.pagemap import PAGE


class MachineChecks(Stage):
    """Fills in the vendor of a machine check, and its page and count by that vendor's rules."""

    def __init__(self, proc: str = "/proc") -> None:
        self._cpu = host.cpu(proc)

    def process(self, events: list[Event], now: int, *, last: bool = False) -> list[Event]:
        """Complete each Mce whose source did not name the vendor."""
        return [
            self._interpret(event) if isinstance(event, Mce) and event.vendor is None else event
            for event in events
        ]

    def _interpret(self, check: Mce) -> Mce:
        cpu, addr, status = self._cpu, check.addr, check.status
        if addr is not None:
            registers = (addr, status, check.misc, cpu.vendor, cpu.physical_bits)
            addr = mce.physical(*registers, bank=check.bank, ipid=check.ipid, smca=cpu.smca)
        return replace(
            check,
            vendor=cpu.vendor,
            pfn=None if addr is None else addr // PAGE,
            count=max(check.count, mce.errors(status, cpu.vendor, check.bank)),
        )
