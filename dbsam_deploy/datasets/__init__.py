"""Data sets of images with label maps, in the layouts they come in: one reader for all."""
