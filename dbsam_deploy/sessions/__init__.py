"""Runtimes behind one interface: tensors of the contract in, tensors of the contract out."""
