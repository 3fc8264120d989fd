"""Prompts on a volume → objects: slices encoded once, masks carried from slice to slice."""
