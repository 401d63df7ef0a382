"""What a bundle has of a host whose firmware reports an error: its DIMM, and the kernel's log.

The machine's DIMM has numbers by kernels.toml. EDAC has no counters here: of its drivers, Debian's
kernels have none for a machine of QEMU's (ghes_edac is not built).
"""

from __future__ import annotations

import json
import re
import tarfile

from tests.lab import cper, ghes
from tests.lab.config import FILE
from tests.lab.harness import PATIENCE, Vmm
from tests.lab.machine import Machine

HOST, TENANT = "hv-arm-17", "tenant-nine"


def bundled(machine: Machine) -> None:
    """A bundle has the numbers of the DIMM and the kernel's lines; with --redact, no names."""
    machine.run(f"hostname {HOST}", check=True)
    tenant = Vmm(machine, TENANT)
    tenant.step("create v backing=anon")
    tenant.step("touch v +3")
    where = tenant.step("pfn v +3")["pfn"] << machine.page_shift
    for severity in (cper.Severity.CORRECTED, cper.Severity.RECOVERABLE):
        cper.memory_error(machine, where, severity, dimm=ghes.DIMM)
    plain, redacted = (_files(machine, options) for options in ("", "--redact"))
    tenant.end()

    (numbers,) = re.findall(r"type=17,(\S+)\"", FILE.read_text())
    given = dict(one.split("=") for one in numbers.split(","))
    (dimm,) = json.loads(plain["hardware.json"])["dimms"]
    assert (dimm["manufacturer"], dimm["part_number"], dimm["serial_number"]) == (
        given["manufacturer"],
        given["part"],
        given["serial"],
    )
    assert (dimm["smbios_handle"], dimm["size_bytes"]) == (ghes.DIMM.handle, 3 << 30)
    assert json.loads(plain["hardware.json"])["edac"] == []
    log = machine.run("dmesg", check=True).stdout
    failures = re.findall(r"Memory failure: .*", log)
    assert failures
    assert [line for line in failures if line not in plain["dmesg.txt"]] == []
    assert "Hardware error from APEI" in plain["dmesg.txt"]
    kernel = json.loads(plain["kernel.json"])
    assert kernel["command_line"] == machine.run("cat /proc/cmdline", check=True).stdout.strip()
    assert kernel["sysctls"]["vm.memory_failure_early_kill"] == 0

    assert redacted.keys() == plain.keys()
    for name in (HOST, TENANT, given["serial"]):
        assert name in "".join(plain.values()), name
        assert [file for file, text in redacted.items() if name in text] == [], name
    (dimm,) = json.loads(redacted["hardware.json"])["dimms"]
    assert dimm["part_number"] == given["part"]
    assert "Memory failure: " in redacted["dmesg.txt"]


def _files(machine: Machine, options: str) -> dict[str, str]:
    """Bundle what can be seen in a second; {file name: text}."""
    command = "kvmtrace bundle --force -o /mnt/share/case.tar.gz --source ftrace --duration 1s"
    machine.run(f"{command} {options}", timeout=PATIENCE, check=True)
    found = {}
    with tarfile.open(machine.share / "case.tar.gz") as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            found[member.name.partition("/")[2]] = content.read().decode()
    return found
