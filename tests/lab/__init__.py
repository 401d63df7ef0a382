"""The lab: disposable emulated machines with a working /dev/kvm, on any host."""
