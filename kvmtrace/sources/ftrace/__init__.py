"""What the ftrace source is made of; sources/ftrace/source.py puts it together.

In the order data flows: ``fields`` (which probe asks the kernel for what), ``dynevents`` (defining
them), ``instance`` (rings and counters of our own), ``ringpage`` (binary pages → records), ``hist``
(exact counts), ``joins`` (records → events). Needs the standard library only.
"""
