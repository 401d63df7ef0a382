"""Every rate limit and size of both sources, in one place.

Events are bounded by these; counts are not: what is limited here is still counted, or its loss is.
"""

from __future__ import annotations

# -- ftrace: the kernel's side

RING_KIB = {"poison": 128, "signals": 128, "faults": 128}
"""Size of each ring, per CPU."""
HIST_ENTRIES = 4096
"""Keys per hist trigger; a power of two, allocated by the kernel when the trigger is set."""

# -- ftrace: how often something is read

BATCH_SECONDS = 0.05  # how long faults may gather after some were read
SIGNAL_SECONDS = 0.02  # how soon to look for the fault that a signal was sent from
COUNT_SECONDS = 1.0  # how often the kernel's counts are read while something is going on
UPKEEP_SECONDS = 1.0  # how often kvm's coming and going, CPUs and missed VMs are looked at
SCAN_SECONDS = 5.0  # how often /proc is searched for VMs if no probe reports new ones

# -- ftrace: muting (sources/ftrace/muting.py)

MUTE_AFTER = 200  # events of one key between two readings of the counts (COUNT_SECONDS)
QUIET_READINGS = 3  # without a new hit, until a key's events are let through again
# Keys of exits, and as many of signals. The conditions that exclude them have to fit into one
# filter, and that into a page of 4 KiB (kernel/trace/trace_events.c, event_filter_write), however
# large the numbers in it are.
MAX_MUTED = 24

# -- ftrace: what is remembered; the oldest is forgotten first

FTRACE_SIGNAL_WAIT_NS = 50_000_000  # until the fault that a signal was sent from has returned
MAX_THREADS = 4096  # with a record that waits for the next one of the same thread
MAX_EXIT_DETAILS = 16384  # keys of exits
MAX_SIGNAL_KEYS = 4096
MAX_VM_ADDRESSES = 4096
MAX_SLOTS = 32768
MAX_POISONED_PAGES = 4096  # of guest_memfds

# -- bpf: passed to the C code by -D

RING_PAGES = 512  # of the ring buffer, all CPUs together
MAX_KEYS = 16384  # of exits, by address
MAX_OVERFLOW = 4096  # of exits without their address; of refusals; of signals
EMIT_INTERVAL_NS = 200_000_000  # between two records of one exit key; its first is emitted at once
EMIT_BURST = 200  # records of exits, over all keys, in one EMIT_WINDOW_NS
EMIT_WINDOW_NS = 100_000_000
SIGNAL_BURST = 200  # records of one signal key in one SIGNAL_WINDOW_NS
SIGNAL_WINDOW_NS = 1_000_000_000

IN_C = (
    "RING_PAGES",
    "MAX_KEYS",
    "MAX_OVERFLOW",
    "EMIT_INTERVAL_NS",
    "EMIT_BURST",
    "EMIT_WINDOW_NS",
    "SIGNAL_BURST",
    "SIGNAL_WINDOW_NS",
)
"""Names of those that the C code has as macros."""

# -- bpf: in Python

GATHER_SECONDS = 0.02  # from one reading of records to the next, if they come in quick succession
# A signal is held back for the fault that it was sent from, which adds the gfn. The fault returns
# right after, but its thread may have to wait for a CPU in between.
BPF_SIGNAL_WAIT_NS = 500_000_000
