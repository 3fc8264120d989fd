"""What glibc does with freed memory: keeps what is needed again, returns what is not.

The server starts with a low MALLOC_MMAP_THRESHOLD_, so that large answers are given back to the
system. Its models' processes inherit that; there each array of a click would be mapped, filled with
zeros page by page, and unmapped again: 3 of the 12 ms that a click took beside its decoding.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
from contextlib import suppress
from pathlib import Path

_TRIM, _MMAP = -1, -3
"""`M_TRIM_THRESHOLD` and `M_MMAP_THRESHOLD` of <malloc.h>."""
_KEPT_BLOCKS = 4
LARGE = 2 << 30


def reuse_blocks(nbytes: int) -> None:
    """Let this process keep a few freed blocks of up to `nbytes`; larger ones go back at once."""
    with suppress(AttributeError):  # a C library without it has no such threshold either
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP, nbytes)
        mallopt(_TRIM, _KEPT_BLOCKS * nbytes)


def give_back(*, above: int = LARGE) -> None:
    """Return memory to Linux that nothing uses: cyclic garbage, and what was freed.

    glibc itself returns what is freed at the top of its heap alone. After the traces of `db_sam`'s
    graphs 0.7 GB were left, and as much as its weights take in objects that hold each other.

    Args:
        above: bytes that the process must have for it; to look for garbage takes half a second.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return
    if pages * mmap.PAGESIZE <= above:
        return
    gc.collect()
    with suppress(AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
