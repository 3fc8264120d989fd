"""Command lines of the doors that load PyTorch: `--help` and a mistyped option do without it."""
