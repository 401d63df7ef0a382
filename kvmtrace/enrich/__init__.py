"""Sources around a source: what the kernel does not report, looked up while it can be."""

from kvmtrace.enrich.heartbeat import Quiet
from kvmtrace.enrich.owners import Observed, Observer
from kvmtrace.enrich.page_release import Releases
from kvmtrace.enrich.vcpu_state import Reactions

__all__ = ["Observed", "Observer", "Quiet", "Reactions", "Releases"]
