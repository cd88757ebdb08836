"""`python -m pbotvm_qemu` is the command line."""

from pbotvm_qemu.cli import main

main()
