"""Freed blocks are used again, in a process that inherits the server's low threshold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_FAULTS = """
import ctypes, resource, sys
import numpy as np
from dbsam_deploy.core.allocation import reuse_blocks

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

PR_SET_THP_DISABLE = 41  # a huge page is one fault for 512 small ones
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
if sys.argv[1] == "reuse":
    reuse_blocks(8 << 20)
for number in range(21):
    if number == 1:
        before = faults()
    np.ones(1 << 20, np.float32)
print((faults() - before) // 20)
"""
_LEFT = """
import sys
from dbsam_deploy.core.allocation import give_back
from support.peak_memory import resident_bytes

blocks = [bytes(8000) for _ in range(20_000)]
last = blocks.pop()  # holds the end of the heap
full = resident_bytes()
del blocks
if sys.argv[1] != "leave":
    give_back(above=int(sys.argv[1]) << 20)
print((full - resident_bytes()) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's thresholds")
def test_a_freed_block_is_not_mapped_anew():
    pages = {}
    for how in ("leave", "reuse"):
        ended = subprocess.run(
            [sys.executable, "-c", _FAULTS, how],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
        )
        pages[how] = int(ended.stdout)
    assert pages["leave"] > 100, "as the server's processes start"
    assert pages["reuse"] < 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_what_lies_between_blocks_in_use_is_given_back():
    freed = {}
    for how in ("leave", "1000", "100"):
        ended = subprocess.run(
            [sys.executable, "-c", _LEFT, how],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
        )
        freed[how] = int(ended.stdout)
    assert freed["leave"] < 20, "as glibc does by itself"
    assert freed["1000"] < 20, "a smaller process is left alone"
    assert freed["100"] > 140, "of 152 MiB"
