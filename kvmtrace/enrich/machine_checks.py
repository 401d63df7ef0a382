"""Interpret machine check registers, whose bits depend on who made the CPU."""

from __future__ import annotations

from dataclasses import replace

from kvmtrace.enrich.stage import Stage
from kvmtrace.events import Event, HwError, MachineCheck
from kvmtrace.linux import host, mce
from kvmtrace.linux.pagemap import PAGE
from kvmtrace.sources.convert import machine_check


class MachineChecks(Stage):
    """Fills in the vendor of a machine check, and its page and count by that vendor's rules."""

    def __init__(self, proc: str = "/proc") -> None:
        self._cpu = host.cpu(proc)

    def process(self, events: list[Event], now: int, *, last: bool = False) -> list[Event]:
        """Complete each machine check whose source did not name the vendor."""
        return [
            self._interpret(event, event.check)
            if isinstance(event, HwError) and event.check and event.check.vendor is None
            else event
            for event in events
        ]

    def _interpret(self, event: HwError, check: MachineCheck) -> HwError:
        cpu, addr, status = self._cpu, event.addr, check.status
        if addr is not None:
            registers = (addr, status, check.misc, cpu.vendor, cpu.physical_bits)
            addr = mce.physical(*registers, bank=check.bank, ipid=check.ipid, smca=cpu.smca)
        return machine_check(
            event.ts,
            replace(check, vendor=cpu.vendor),
            event.addr,
            None if addr is None else addr // PAGE,
            max(event.count, mce.errors(status, cpu.vendor, check.bank)),
        )
