"""Events in, immutable snapshots out: pure, bounded, no clock but the events'."""

from kvmtrace.correlate.correlator import Correlator, Told, cause_of

__all__ = ["Correlator", "Told", "cause_of"]
