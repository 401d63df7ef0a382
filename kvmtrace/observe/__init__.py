"""Sources around a source: what the kernel does not report, looked up while it can be."""

from kvmtrace.observe.observed import Observed, Observer
from kvmtrace.observe.quiet import Quiet
from kvmtrace.observe.reactions import Reactions
from kvmtrace.observe.releases import Releases

__all__ = ["Observed", "Observer", "Quiet", "Reactions", "Releases"]
