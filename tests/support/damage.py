"""Files with damage at random places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from dbsam_deploy.core.errors import InputError


def refusals(
    path: Path, read: Callable[[Path], object], rng: np.random.Generator, *, times: int, below: int
) -> int:
    """How often `read` refuses `path` when four of its first bytes are others.

    Any other error than a refusal passes.

    Args:
        path: a good file, overwritten.
        read: the reader.
        rng: source of places and bytes.
        times: how many damaged files are read.
        below: only bytes before this one are changed.
    """
    content, refused = path.read_bytes(), 0
    for _ in range(times):
        damaged = bytearray(content)
        for place in rng.integers(0, min(below, len(content)), 4):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(bytes(damaged))
        try:
            read(path)
        except InputError:
            refused += 1
    return refused
