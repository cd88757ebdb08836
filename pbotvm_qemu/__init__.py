"""Run code from strangers in QEMU virtual machines that are put back to a clean snapshot."""

__version__ = "0.1.0"
