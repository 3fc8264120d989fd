"""Many studies: each for itself, each once, here or on a cluster."""
