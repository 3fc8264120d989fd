"""A mask carried to the next slice by the image alone: similar surroundings have the same label.

Non-local label transfer (Coupé et al., NeuroImage 54, 2011; Rousseau et al., IEEE TMI 30, 2011),
from one slice to the next: each pixel takes the labels of those pixels near it on the slice before
whose surroundings look most like its own. It knows nothing of any organ, and follows what the
prompted object looks like.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..core.imaging import FloatArray
from ..core.masks import extent_of

GRID = 128
"""Slices are reduced by a whole number, to about this many pixels on the longer side."""
REACH = 1.5
"""How far an outline moves at most from slice to slice, in distances between slices."""
MIN_REACH_PX, MAX_REACH_PX = 2, 7
_PATCH = 1  # 3×3 pixels
_NOISE = 4.0  # grey values squared: what differs by less is alike
_SHARPNESS = 2.0


def transferred(
    before: npt.NDArray[np.uint8],
    pixels: npt.NDArray[np.uint8],
    mask: npt.NDArray[np.bool_],
    spacing_mm: tuple[float, float, float] | None = None,
) -> FloatArray:
    """How much each pixel of a slice looks like the object on the slice before it.

    Args:
        before: (H, W) grey or (H, W, 3) RGB pixels of the slice before.
        pixels: the same of this slice.
        mask: (H, W) of the object on the slice before.
        spacing_mm: distance between slices, rows and columns.

    Returns:
        (H, W) float32 from 0 to 1; above 0.5 most of what is alike was the object.
    """
    height, width = mask.shape
    step = max(1, round(max(height, width) / GRID))
    labels = _reduced(mask, step)
    reach = _reach(spacing_mm, step)
    out = np.zeros_like(labels)
    part = _around(labels, 2 * reach + _PATCH + 2)
    out[part] = _vote(
        _reduced(before, step)[part], _reduced(pixels, step)[part], labels[part], reach
    )
    return _enlarged(out, step)[:height, :width]


def _reach(spacing_mm: tuple[float, float, float] | None, step: int) -> int:
    if spacing_mm is None:
        return (MIN_REACH_PX + MAX_REACH_PX) // 2
    pixels = REACH * spacing_mm[0] / (max(spacing_mm[1:]) * step)
    return int(np.clip(round(pixels), MIN_REACH_PX, MAX_REACH_PX))


def _reduced(values: npt.NDArray[np.generic], step: int) -> FloatArray:
    """(H, W), or (H, W, 3) as grey, → means of step×step pixels; at the edges of those left."""
    plane = np.asarray(values, np.float32)
    plane = plane.mean(2) if plane.ndim == 3 else plane
    return np.asarray(Image.fromarray(plane).reduce(step))


def _around(labels: FloatArray, margin: int) -> tuple[slice, slice]:
    """Rows and columns of the object and `margin` pixels around it."""
    (top, bottom), (left, right) = extent_of(labels > 0) or ((0, 1), (0, 1))
    rows = slice(max(top - margin, 0), bottom + margin)
    return rows, slice(max(left - margin, 0), right + margin)


def _vote(before: FloatArray, pixels: FloatArray, labels: FloatArray, reach: int) -> FloatArray:
    """Mean label of the pixels within `reach` on the slice before, the more alike the heavier."""
    height, width = labels.shape
    near = np.arange(-reach, reach + 1)
    moves = [(dy, dx) for dy in near for dx in near if dy * dy + dx * dx <= reach * reach]
    padded, marks = np.pad(before, reach, mode="edge"), np.pad(labels, reach)
    windows = [
        (slice(reach + dy, reach + dy + height), slice(reach + dx, reach + dx + width))
        for dy, dx in moves
    ]
    distances = np.stack([_patch_mean((padded[window] - pixels) ** 2) for window in windows])
    least = distances.min(0)
    far = np.array([dy * dy + dx * dx for dy, dx in moves], np.float32)[:, None, None]
    unlike = _SHARPNESS * (distances - least) / (least + _NOISE)
    weights = np.exp(-unlike - far / (2 * (reach / 1.5) ** 2))
    votes = np.stack([marks[window] for window in windows])
    return np.asarray((weights * votes).sum(0) / weights.sum(0), np.float32)


def _patch_mean(plane: FloatArray) -> FloatArray:
    """Mean of each pixel's surroundings."""
    height, width = plane.shape
    size = 2 * _PATCH + 1
    padded = np.pad(plane, _PATCH, mode="edge")
    rows = np.add.reduce([padded[k : k + height] for k in range(size)])
    both = np.add.reduce([rows[:, k : k + width] for k in range(size)])
    return np.asarray(both / size**2, np.float32)


def _enlarged(plane: FloatArray, step: int) -> FloatArray:
    """Each pixel → step×step pixels, linear between the centres."""
    size = (plane.shape[1] * step, plane.shape[0] * step)
    return np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR))
