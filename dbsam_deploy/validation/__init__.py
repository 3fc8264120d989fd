"""One machine proved, step by step, each in a process of its own; see docs/how-to/validate.md."""
