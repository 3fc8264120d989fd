"""The Triton model repository, and the real server on a CPU machine."""
