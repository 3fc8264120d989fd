"""Grey values → the numbers that an encoder takes, channel by channel and in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .resizing import ByteArray
from .upscaling import FloatArray

PIXEL_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
PIXEL_STD = np.array([58.395, 57.12, 57.375], np.float32)
"""SAM's statistics of R, G and B on 0–255."""


def z_score(pixels: npt.NDArray[Any], out: FloatArray) -> None:
    """By SAM's statistics, (H, W, 3) → (3, H, W)."""
    for channel, plane in enumerate(out):  # in place: a sixth of the time of whole images
        plane[...] = pixels[..., channel]
        plane -= PIXEL_MEAN[channel]
        plane /= PIXEL_STD[channel]


def unit_range(pixels: ByteArray, out: FloatArray) -> None:
    """Min–max to 0–1 over the whole image, (H, W, 3) → (3, H, W); a constant one becomes zero."""
    low, high = float(pixels.min()), float(pixels.max())
    levels = np.arange(256, dtype=np.uint8)
    scaled = ((levels - low) / max(high - low, 1e-8)).astype(np.float32)
    for channel, plane in enumerate(out):
        plane[...] = scaled[pixels[..., channel]]
