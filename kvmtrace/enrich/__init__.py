"""Sources around a source: what the kernel does not report, looked up while it can be."""

from kvmtrace.enrich.heartbeat import Heartbeat
from kvmtrace.enrich.owners import Observer, OwnerLookup
from kvmtrace.enrich.page_release import PageReleaseWatch
from kvmtrace.enrich.vcpu_state import VcpuFollowUp

__all__ = ["Heartbeat", "Observer", "OwnerLookup", "PageReleaseWatch", "VcpuFollowUp"]
