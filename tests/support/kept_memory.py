"""Plugin: memory that a test has freed stays with the process, for the next one.

glibc gives large arrays back at once; when the next is made, Linux fills it with zeros, page by
page. A model at 1024 px spent a quarter of its processor time on that. What the package does about
it is tested in processes of their own.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

import pytest

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Of <malloc.h>."""
_KEPT = 1 << 30


def pytest_configure(config: pytest.Config) -> None:
    """Take arrays from the heap, whose free end goes back from 1 GiB on; not in benchmarks."""
    if not config.getoption("benchmark"):
        with suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_MMAP_MAX, 0)
            mallopt(_TRIM_THRESHOLD, _KEPT)
