"""The lab: disposable machines with a working /dev/kvm, whatever the host."""
