"""Files of a bundle about the host itself: its memory, and what the kernel has on its failures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmtrace.linux.edac import EdacCount
from kvmtrace.linux.smbios import MemoryDevice
from kvmtrace.views import json_output
from kvmtrace.views.redaction import Redaction


@dataclass(frozen=True, slots=True)
class HostRecords:
    """What this host has on memory and its failures.

    ``dimms``: None if they could not be read. ``kernel_log``: lines about memory errors; None if it
    could not be read, with ``log_error``. ``failures``: {node: {counter: pages}}.
    """

    command_line: str | None
    settings: Mapping[str, int]
    failures: Mapping[str, Mapping[str, int]]
    dimms: tuple[MemoryDevice, ...] | None
    edac: tuple[EdacCount, ...]
    kernel_log: tuple[str, ...] | None
    log_error: str | None = None


def host_files(records: HostRecords, names: Redaction | None) -> dict[str, str]:
    """{file name: text}. ``names``: replaces names, and leaves out what may hold others."""
    return {
        "hardware.json": _json(_hardware(records, names)),
        "kernel.json": _json(_kernel(records, names)),
        "dmesg.txt": _log(records, names),
    }


def _hardware(records: HostRecords, names: Redaction | None) -> dict[str, Any]:
    def text(value: str | None) -> str | None:
        return names.text(value) if value and names else value

    dimms = None
    if records.dimms is not None:
        dimms = [
            json_output.known(
                label=text(dimm.label),
                manufacturer=text(dimm.manufacturer),
                part_number=text(dimm.part_number),
                serial_number=names.serial(dimm.serial_number) if names else dimm.serial_number,
                size_bytes=dimm.size_bytes,
                speed=dimm.speed,
                smbios_handle=dimm.handle,
            )
            for dimm in records.dimms
        ]
    counts = [
        json_output.known(
            place=count.place,
            name=text(count.name),
            location=text(count.location),
            corrected=count.corrected,
            uncorrected=count.uncorrected,
        )
        for count in records.edac
    ]
    return json_output.known(dimms=dimms, edac=counts, memory_failure=records.failures)


def _kernel(records: HostRecords, names: Redaction | None) -> dict[str, Any]:
    line, left_out = records.command_line, None
    if line is not None and names is not None:
        words = line.split()
        kept = [names.text(word) for word in words if _is_kept(word)]
        line, left_out = " ".join(kept), len(words) - len(kept)
    sysctls = {f"vm.{name}": value for name, value in records.settings.items()}
    return json_output.known(command_line=line, left_out=left_out, sysctls=sysctls)


# What matters to memory, its failures and KVM. Others may hold anything: disks, keys, addresses.
_KEPT = re.compile(
    r"(?:mce|ras|edac|ghes|erst|hest|bert|apei|einj|cec|acpi|efi|mem|memmap|memtest|mem_encrypt"
    r"|(?:default_)?hugepages(?:z)?|hugepages|transparent_hugepage|hugetlb\w*|page_poison|kernelcore"
    r"|movablecore|init_on_(?:alloc|free)|numa\w*|iommu|intel_iommu|amd_iommu|iommu\.\w+|kvm\w*"
    r"|kvm[-_]\w+\.\w+|kvm\.\w+|lockdown|nokaslr|kaslr|mitigations|nosmt|isolcpus|nohz_full|rcu_nocbs"
    r"|panic|oops|crashkernel|nmi_watchdog|nopti|sysctl\.vm\.\w+|ro|rw|quiet|debug|nomce|maxcpus"
    r"|\w*(?:edac|ghes)\.\w+)(?:=[\w.,:@!*/+-]{0,200})?",
    re.ASCII,
)


def _is_kept(word: str) -> bool:
    return _KEPT.fullmatch(word) is not None


def _log(records: HostRecords, names: Redaction | None) -> str:
    if records.kernel_log is None:
        return f"the kernel's log could not be read: {records.log_error}\n"
    if not records.kernel_log:
        return "the kernel's log has nothing about memory errors (any more)\n"
    lines = (names.log_line(one) if names else one for one in records.kernel_log)
    return "".join(f"{line}\n" for line in lines)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"
