"""Numbers that follow from a name alone, the same on every machine and in every version."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


def fixed_numbers(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Evenly spread in -1 to 1, without any pattern: the finaliser of splitmix64 on a counter."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        x = np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64(start)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    unit = (x >> np.uint64(40)).astype(np.float64) / 2**24
    return (2 * unit - 1).astype(np.float32).reshape(shape)


def fixed_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, npt.NDArray[Any]]:
    """Weights of ordinary size for every name: layers keep the scale of what they get.

    Norms are about one, variances positive; tables and biases are not zero, so that one which is
    dropped is found out.
    """
    made: dict[str, npt.NDArray[Any]] = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            made[name] = np.zeros(shape, np.int64)
            continue
        values = fixed_numbers(name, shape)
        last = name.rpartition(".")[2]
        if last == "running_var" or (last == "weight" and len(shape) == 1):
            made[name] = 1 + values / 2
        elif len(shape) > 1 and last == "weight" and "embed" not in name.split(".")[-2]:
            made[name] = values * np.float32(math.sqrt(3 / math.prod(shape[1:])))
        else:
            made[name] = values / 2
    return made
