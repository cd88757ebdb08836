"""Makes complete programs of what people type, compiles them, and shows what they did. Runs in the guest, as user vm."""
