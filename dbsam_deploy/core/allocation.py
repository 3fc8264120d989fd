"""What glibc does with freed memory: keeps what is needed again, returns what is not.

The server starts with a low MALLOC_MMAP_THRESHOLD_, so that large answers are given back to the
system. Its models' processes inherit that; there each array of a click would be mapped, filled with
zeros page by page, and unmapped again: 3 of the 12 ms that a click took beside its decoding.
"""

from __future__ import annotations

import ctypes
import gc
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


def give_back() -> None:
    """Return memory to the system that nothing uses: cyclic garbage, and what was freed.

    glibc itself returns what is freed at the top of its heap alone. After the traces of `db_sam`'s
    graphs 0.7 GB were left, and as much as its weights take in objects that hold each other.
    """
    gc.collect()
    # Others than glibc have no such call, and Windows no library of this name
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
