"""Drawn training images with exact masks."""
