"""Stages that add to events what the kernel does not report. ``pipeline`` has them in order."""
