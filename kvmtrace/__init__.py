"""kvmtrace: which VMs hold poisoned memory, was the VMM notified, and is it over?"""

__version__ = "0.1.0"
