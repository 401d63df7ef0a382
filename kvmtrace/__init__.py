"""kvmtrace: which VMs hold poisoned memory, was the VMM told, and is it over?"""

__version__ = "0.1.0"
