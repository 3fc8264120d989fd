"""Keeps glibc from returning memory that the next request needs again.

The server starts with a low MALLOC_MMAP_THRESHOLD_, so that large answers are given back to the
system. Its models' processes inherit that; there each array of a click would be mapped, filled with
zeros page by page, and unmapped again: 3 of the 12 ms that a click took beside its decoding.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM, _MMAP = -1, -3
"""`M_TRIM_THRESHOLD` and `M_MMAP_THRESHOLD` of <malloc.h>."""
_KEPT_BLOCKS = 4


def reuse_blocks(nbytes: int) -> None:
    """Let this process keep a few freed blocks of up to `nbytes`; larger ones go back at once."""
    with suppress(AttributeError):  # a C library without it has no such threshold either
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP, nbytes)
        mallopt(_TRIM, _KEPT_BLOCKS * nbytes)
