"""The command line: the only place that prints and exits. Data goes to stdout, everything else to stderr."""

from pbotvm_qemu.cli.entry import main

__all__ = ["main"]
