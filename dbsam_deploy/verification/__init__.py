"""Real cases, parity with PyTorch, the gate and the closing table."""
