"""Resizing along one axis as a table: of each element, which of the source it is made of.

A graph resizes rows and columns by such tables (`graphs.imaging_graphs`), so that one graph serves
every size of image. They are computed here once for each size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .contract import MASK_TAPS
from .resizing import nearest_pixels
from .upscaling import FloatArray, Upscale, axis_lines

_Table = tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]
"""Places and weights."""
FIXED_POINT = 1 << 22
"""What stands for 1 in the weights of Pillow's filters for whole grey values."""
_ROUND_UP = 1 + 2.0**-20
"""Means of four whole numbers times this round up where they end with a half, and only there."""


@dataclass(frozen=True, eq=False)
class Taps:
    """Element i is the sum of `weights[i, t] · source[places[i, t]]` over t.

    Attributes:
        places: (n, T) int32; 0 where the weight is 0.
        weights: (n, T) float32; all 0 for an element that there is not.
    """

    places: npt.NDArray[np.int32]
    weights: FloatArray

    def padded(self, count: int) -> Taps:
        """The same with elements of no weight behind, `count` in all."""
        rows = ((0, count - len(self.places)), (0, 0))
        return Taps(np.pad(self.places, rows), np.pad(self.weights, rows))

    def in_rows_of(self, count: int) -> Taps:
        """The same as arrays (n / count, count, T)."""
        shape = (-1, count, self.places.shape[1])
        return Taps(self.places.reshape(shape), self.weights.reshape(shape))


@lru_cache(32)
def image_taps(mode: str, source: int, count: int, side: int, *, halved: bool = False) -> Taps:
    """How a graph resizes an image's rows or columns, as `imaging.preprocess` does in that mode.

    Args:
        mode: `sam`, `medsam2`, `sam_med2d` (weights are whole numbers, `FIXED_POINT` for 1), `sam2`
            or `lite_medsam`.
        source: rows or columns of the image.
        count: of the result.
        side: of the encoder's image; what is not filled has no weights.
        halved: `lite_medsam`: both sides of the image are halved.
    """
    if mode == "sam_med2d":
        chosen = nearest_pixels(source, count).astype(np.int32)[:, None]
        return Taps(chosen, np.full((count, 1), FIXED_POINT, np.float32)).padded(side)
    if mode == "lite_medsam":
        return _area(source, count, _ROUND_UP if halved else 1).padded(side)
    places, weights = _filtered(source, count, cubic=mode == "medsam2")
    if mode != "sam2":
        weights = np.trunc(weights * FIXED_POINT + np.copysign(0.5, weights))
    return Taps(places, weights.astype(np.float32)).padded(side)


@lru_cache(32)
def equal_taps(count: int, side: int, one: float, digits: int = 1) -> Taps:
    """Rows or columns that have the right size already.

    Args:
        count: of the result.
        side: of the encoder's image; what is not filled has no weights.
        one: the weight.
        digits: of each element, in base 256; the source has all first ones, then all second ones.
    """
    places = np.arange(count * digits, dtype=np.int32).reshape(digits, count).T
    weights = np.tile(np.float32(one) / np.float32(256) ** np.arange(digits), (count, 1))
    return Taps(np.ascontiguousarray(places), weights.astype(np.float32)).padded(side)


def _filtered(source: int, count: int, *, cubic: bool) -> _Table:
    """Pillow's bilinear or bicubic filter, which is as wide as the step between its elements."""
    scale = source / count
    stretch = max(scale, 1.0)
    support = stretch * (2 if cubic else 1)
    centres = (np.arange(count) + 0.5) * scale
    first = np.maximum((centres - support + 0.5).astype(int), 0)
    last = np.minimum((centres + support + 0.5).astype(int), source)
    places = first[:, None] + np.arange((last - first).max())
    distance = np.abs((places - centres[:, None] + 0.5) / stretch)
    weights = np.where(places < last[:, None], _cubic(distance) if cubic else 1 - distance, 0)
    weights = np.maximum(weights, 0) if not cubic else weights
    weights /= weights.sum(1, keepdims=True)
    return _compact(places, weights)


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Pillow's bicubic filter, a = -0.5."""
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _area(source: int, count: int, factor: float) -> Taps:
    """The mean of what each element covers; the ends count for the part of them that it covers."""
    step = source / count
    start = np.arange(count) * step
    stop = np.minimum(start + step, source)
    first, last = start.astype(int), np.ceil(stop).astype(int) - 1
    places = first[:, None] + np.arange((last - first).max() + 1)
    covered = np.minimum(places + 1, stop[:, None]) - np.maximum(places, start[:, None])
    weights = np.maximum(covered, 0) / (stop - start)[:, None] * factor
    found, kept = _compact(places, weights)
    return Taps(found, kept.astype(np.float32))


def _compact(places: npt.NDArray[np.intp], weights: npt.NDArray[np.float64]) -> _Table:
    """The same without taps that have no weight anywhere; place 0 for those without weight."""
    used = np.flatnonzero((weights != 0).any(0))
    part = slice(used[0], used[-1] + 1)
    weights = weights[:, part]
    return np.where(weights != 0, places[:, part], 0).astype(np.int32), weights


@lru_cache(32)
def mask_taps(side: int, stages: tuple[Upscale, ...], axis: int, count: int) -> Taps:
    """Of each row or column of a mask, the logits that it depends on, at most `MASK_TAPS`.

    All stages of `upscaling.resample` at once: they are linear, so their tables are multiplied.

    Args:
        side: of the logits.
        stages: from the mask grid to the image.
        axis: 0 for rows, 1 for columns.
        count: of elements; those behind the mask's last have no weights.
    """
    dense = np.eye(side)
    for line in axis_lines((side, side), stages, axis):
        weight = line.weight.astype(np.float64)[:, None]
        dense = dense[line.low] * (1 - weight) + dense[line.high] * weight
    order = np.argsort(dense == 0, axis=1, kind="stable")[:, :MASK_TAPS]
    weights = np.take_along_axis(dense, order, 1).astype(np.float32)
    if not math.isclose(float(weights.sum(1).min()), 1, rel_tol=1e-5):
        raise ValueError(f"a pixel depends on more than {MASK_TAPS} logits of a line")
    return Taps(np.where(weights != 0, order, 0).astype(np.int32), weights).padded(count)
