"""Events in, immutable snapshots out: pure, bounded, no clock but the events'."""

from kvmtrace.correlate.correlator import Correlator, cause_of

__all__ = ["Correlator", "cause_of"]
