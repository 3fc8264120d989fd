"""Ways to another image size that Pillow does not have as they are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import MissingError
from .upscaling import FloatArray

ByteArray = npt.NDArray[np.uint8]

SCIKIT_IMAGE_LINE = 'pip install "scikit-image>=0.24"'
"""Right both for a user of the library and inside Triton's environment."""


def filtered_resize(image: ByteArray, size: tuple[int, int], *, cubic: bool) -> ByteArray:
    """Pillow's bilinear or bicubic filter; whole grey values between its two passes and behind.

    Columns come first, as in every Pillow before 13: that takes the rows of some tall images first,
    which changes grey values by one.

    Args:
        image: (H, W, 3) uint8.
        size: height and width of the result.
        cubic: bicubic.
    """
    kind = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    wide = Image.fromarray(image).resize((size[1], image.shape[0]), kind)
    return np.asarray(wide.resize((size[1], size[0]), kind))


def bilinear_resize(image: ByteArray, size: int) -> FloatArray:
    """(H, W, 3) → (size, size, 3), not rounded to whole grey values."""
    planes = (Image.fromarray(image[..., c].astype(np.float32)) for c in range(3))
    sides = (size, size)
    return np.stack([np.asarray(p.resize(sides, Image.Resampling.BILINEAR)) for p in planes], -1)


def spline_resize(image: ByteArray, size: int) -> ByteArray:
    """(H, W, 3) → (size, size, 3) by a spline of order 3 behind antialiasing, as in MedSAM.

    Raises:
        MissingError: scikit-image is not installed.
    """
    try:
        from skimage.transform import resize
    except ImportError as error:
        raise MissingError(
            "MedSAM's preprocessing needs scikit-image, which is not installed", SCIKIT_IMAGE_LINE
        ) from error
    pixels = resize(image, (size, size), order=3, preserve_range=True, anti_aliasing=True)
    found: ByteArray = pixels.astype(np.uint8)
    return found


def nearest_pixels(source: int, count: int) -> npt.NDArray[np.intp]:
    """Which of `source` pixels each of `count` takes; OpenCV rounds the step twice."""
    step = 1 / (count / source)
    return np.minimum((np.arange(count) * step).astype(np.intp), source - 1)


def area_resize(image: ByteArray, size: tuple[int, int]) -> ByteArray:
    """Upscale by area: each pixel of the result is the mean of the part of the image it covers.

    OpenCV's INTER_AREA; where it enlarges, OpenCV's rounded weights may differ by one grey value.

    Args:
        image: (H, W, C) uint8.
        size: height and width of the result.
    """
    rows = _area_rows(image, size[0])
    resized = _area_rows(rows.transpose(1, 0, 2), size[1]).transpose(1, 0, 2)
    # OpenCV rounds ties up where it halves an image, and to even elsewhere.
    halved = image.shape[:2] == (2 * size[0], 2 * size[1])
    return (np.floor(resized + 0.5) if halved else np.rint(resized)).astype(np.uint8)


def _area_rows(x: npt.NDArray[Any], count: int) -> npt.NDArray[np.float64]:
    """(N, ...) → (count, ...), row by row so that large images need no copy."""
    step = len(x) / count
    out = np.empty((count, *x.shape[1:]), np.float64)
    for i in range(count):
        start, stop = i * step, min((i + 1) * step, len(x))
        first, last = int(start), math.ceil(stop) - 1
        total = x[first : last + 1].sum(0, dtype=np.float64)
        total -= x[first] * (start - first)
        total -= x[last] * (last + 1 - stop)
        out[i] = total / (stop - start)
    return out
