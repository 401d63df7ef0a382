"""The ftrace source: tracefs dynamic events, with the standard library only.

How a record walks: a probe hits, and its event (``attach``, ``linux.tracefs.dynamic_events``) goes
into a ring of ours (``linux.tracefs.instance``). ``source`` reads the ring's pages, and
``linux.tracefs.ring_page`` decodes them to records. ``translator`` passes each record to its topic
(``exits``, ``refusals``, ``signals``, ``poison``, ``hardware``, ``vms``), which returns events.

A topic has all of its probes: fields, filter, ring and hist trigger (``PROBES``), beside the code
that reads them. The triggers' exact counts take another way: ``linux.tracefs.histogram`` reads
them, ``totals`` sorts them by key, and the topics report what no event has reported. ``muting``
keeps events that come too often out of the rings.
"""
