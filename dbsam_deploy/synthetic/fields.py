"""Smooth random fields by B-splines: two small matrix products instead of a large blur."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import numpy.typing as npt

from ..core.imaging import FloatArray
from ..extras import require

IntMap = npt.NDArray[np.int32]


def require_scipy() -> ModuleType:
    """The package scipy, whose parts load when they are first used.

    Raises:
        MissingError: it is not installed.
    """
    return require("scipy", extra="train", what_for="a synthetic image")


def spline_basis(size: int, cells: int) -> FloatArray:
    """(size, cells + 3) float32 weights of the uniform cubic B-spline on `cells` equal cells."""
    at = (np.arange(size, dtype=np.float32) + 0.5) * (cells / size)
    cell = np.minimum(at.astype(np.intp), cells - 1)
    t = at - cell
    weights = (
        (1 - t) ** 3,
        3 * t**3 - 6 * t**2 + 4,
        -3 * t**3 + 3 * t**2 + 3 * t + 1,
        t**3,
    )
    out = np.zeros((size, cells + 3), np.float32)
    rows = np.arange(size)
    for offset, weight in enumerate(weights):
        out[rows, cell + offset] = weight / 6
    return out


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cells: float) -> FloatArray:
    """Band-limited Gaussian noise.

    Args:
        rng: the random state.
        shape: (H, W).
        cells: number of spline cells along the longer side; the larger, the finer.

    Returns:
        (H, W) float32, mean 0 and standard deviation 1.
    """
    height, width = shape
    step = max(shape) / max(cells, 1.0)
    rows, columns = max(1, round(height / step)), max(1, round(width / step))
    coarse = rng.standard_normal((rows + 3, columns + 3), dtype=np.float32)
    field = spline_basis(height, rows) @ coarse @ spline_basis(width, columns).T
    field -= field.mean()
    field /= max(float(field.std()), 1e-6)
    return np.asarray(field, np.float32)


def fractal_noise(
    rng: np.random.Generator, shape: tuple[int, int], *, cells: float, octaves: int, decay: float
) -> FloatArray:
    """Sum of `octaves` smooth noises, each twice as fine and `decay` times as strong, std 1."""
    total = smooth_noise(rng, shape, cells)
    strength, finest = 1.0, max(shape) / 2
    for octave in range(1, octaves):
        strength *= decay
        if cells * 2**octave > finest:
            break
        total += np.float32(strength) * smooth_noise(rng, shape, cells * 2**octave)
    total /= max(float(total.std()), 1e-6)
    return total


def ramps(shape: tuple[int, int]) -> tuple[FloatArray, FloatArray]:
    """Row coordinate as (H, 1) and column coordinate as (1, W), float32 in -1 … 1."""
    height, width = shape
    y = (np.arange(height, dtype=np.float32) + 0.5) * (2 / height) - 1
    x = (np.arange(width, dtype=np.float32) + 0.5) * (2 / width) - 1
    return y[:, None], x[None, :]


def stripes(rng: np.random.Generator, shape: tuple[int, int]) -> FloatArray:
    """Wavy parallel stripes of random direction and period, (H, W) float32 in -1 … 1."""
    y, x = ramps(shape)
    angle, waves = rng.uniform(0, np.pi), rng.uniform(4, 40)
    phase = waves * (np.cos(angle) * x + np.sin(angle) * y)
    phase = phase + np.float32(rng.uniform(0, 2)) * smooth_noise(rng, shape, rng.uniform(2, 6))
    return np.sin(phase, dtype=np.float32)


def warp(rng: np.random.Generator, regions: IntMap, strength: float, cells: float) -> IntMap:
    """Move the pixels of a label map along a smooth random displacement (nearest neighbour).

    Args:
        rng: the random state.
        regions: (H, W) int32.
        strength: standard deviation of the displacement as a share of the longer side.
        cells: fineness of the displacement, see `smooth_noise`.
    """
    height, width = regions.shape
    scale = np.float32(strength * max(height, width))
    rows = np.arange(height, dtype=np.float32)[:, None] + 0.5
    columns = np.arange(width, dtype=np.float32)[None, :] + 0.5
    rows = rows + scale * smooth_noise(rng, (height, width), cells)
    columns = columns + scale * smooth_noise(rng, (height, width), cells)
    y = np.clip(rows, 0, height - 1).astype(np.int32)
    x = np.clip(columns, 0, width - 1).astype(np.int32)
    y *= width
    y += x
    return np.asarray(np.take(regions, y))
