"""Events in, immutable snapshots out: pure, bounded, no clock but the events'."""

from kvmtrace.correlate.causes import cause_of
from kvmtrace.correlate.correlator import Correlator

__all__ = ["Correlator", "cause_of"]
