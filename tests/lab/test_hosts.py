"""The scenarios of hosts.py on the newest kernel, each by the source that it matters to.

``make matrix`` runs them on every kernel by both sources.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.lab.conftest import Boot
from tests.lab.harness import end_following, kvmtrace
from tests.lab.hosts import (
    HIDE_KVM_BTF,
    HOSTS,
    kvm_comes_and_goes,
    lockdown,
    no_kvm_types,
    no_tracefs,
    unprivileged,
)
from tests.lab.machine import Machine

pytestmark = pytest.mark.lab

BOOTS = {scenario.run: scenario.boot for scenario in HOSTS}


@pytest.mark.parametrize(
    ("run", "source"),
    [
        (no_kvm_types, "bpf"),
        (no_tracefs, "ftrace"),
        (unprivileged, "ftrace"),
        (lockdown, "bpf"),
        (kvm_comes_and_goes, "ftrace"),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_host(
    run: Callable[..., None], source: str, boot: Boot, request: pytest.FixtureRequest
) -> None:
    options = BOOTS[run]
    machine: Machine = boot(**options) if options else request.getfixturevalue("machine")
    end_following(machine)
    run(machine, source)


# Without BTF of kvm there is no fexit; the rest hides all interfaces by which bcc adds kprobes.
BPF_SEES_NO_KVM = (
    f"{HIDE_KVM_BTF} && mount -t tmpfs none /sys/bus/event_source/devices/kprobe"
    " && umount -R /sys/kernel/debug && mount --bind /dev/null /sys/kernel/tracing/kprobe_events"
)


def test_auto_takes_the_source_that_sees_more(machine: Machine) -> None:
    """bpf attaches to tracepoints, those of kvm too, but not to functions, which are in kvm."""
    end_following(machine)
    shown = json.loads(kvmtrace(machine, "top --once --json", mount_change=BPF_SEES_NO_KVM).stdout)
    assert shown["host"]["source"] == "ftrace"
    assert shown["host"]["source_why"].startswith("bpf does not see gmem_error, gmem, faultin")
    assert [x["attached"] for x in shown["probes"] if x["name"] == "run"] == [True]
