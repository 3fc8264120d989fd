"""What `tests/support/kept_memory.py` does to this process."""

import resource
import sys

import pytest

SIZE = 32 << 20
PAGES = SIZE // resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_memory_is_not_filled_with_zeros_again() -> None:
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(SIZE)
        taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert max(taken[1:]) < PAGES // 10, taken
