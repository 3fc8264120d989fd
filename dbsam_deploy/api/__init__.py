"""What programs and commands call: one opened model, and the way to open it."""
