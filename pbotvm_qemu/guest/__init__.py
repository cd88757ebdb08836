"""What runs inside the virtual machine. Python standard library only; imports nothing outside this package."""
