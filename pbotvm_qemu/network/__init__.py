"""What the host does for guests' networks: interfaces, addresses, rules. `net.py` is its face for a machine."""
