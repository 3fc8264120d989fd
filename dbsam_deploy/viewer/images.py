"""A viewer's array → a volume whose slices a model can see."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..images.intensity import STORED, Window, to_uint8
from ..images.volumes import SOFT_TISSUE, SOFT_TISSUE_TEXT, Volume

CT_BELOW = -500
"""Whole numbers that go down to here are Hounsfield units."""
SOURCE = Path("the viewer's image")
"""Named in messages; a viewer sends no name."""
_LOG = logging.getLogger(__name__)


def as_viewer_volume(values: npt.NDArray[Any], spacing: Any, window: Window | None) -> Volume:
    """A volume of the (1, D, H, W) array that a viewer sends as it is stored.

    Without a window CT is shown by the soft-tissue one: whole numbers that go down to `CT_BELOW`
    are taken for CT. Other values go the library's usual way (`to_uint8`). Values that are not
    finite become the lowest or highest that is.

    Args:
        values: of any real type, or bool.
        spacing: distance between voxels along D, H and W; 1 unless it is three usable numbers.
        window: level and width for every image, where the server was told.

    Raises:
        InputError: another shape, or a window that is not usable.
    """
    if values.ndim != 4 or values.shape[0] != 1 or 0 in values.shape:
        raise InputError(f"image {values.shape}: expected (1, X, Y, Z), one channel of grey values")
    stored = finite(values[0])
    tries: list[tuple[Window | None, str]] = [(window, "")] if window is not None else []
    if window is None and is_ct(stored):
        tries.append((SOFT_TISSUE, SOFT_TISSUE_TEXT))
    pixels, how = _first_with_contrast(stored, [*tries, (None, "")])
    _LOG.info("an image of %s voxels: %s", "×".join(map(str, stored.shape)), how)
    return Volume(SOURCE, "viewer", pixels, how, spacing_mm=_spacing(spacing))


def _first_with_contrast(
    stored: npt.NDArray[Any], tries: list[tuple[Window | None, str]]
) -> tuple[npt.NDArray[np.uint8], Any]:
    """By the first window in which not all is one grey; black where the image itself is even."""
    for window, text in tries:
        try:
            return to_uint8(stored, window, SOURCE, window_text=text)
        except InputError as error:
            _LOG.warning("%s", error.message)
    how = dataclasses.replace(STORED, text="one value only, in which nothing is found")
    return np.zeros(stored.shape, np.uint8), how


def is_ct(stored: npt.NDArray[Any]) -> bool:
    """Whether values are Hounsfield units, as far as they tell."""
    return bool(stored.dtype.kind in "if" and stored.min() <= CT_BELOW and _are_whole(stored))


def finite(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same, with NaN and infinity replaced, and bool as 0 and 255."""
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return values
    finite = values[np.isfinite(values)]
    if not finite.size:
        return np.zeros(values.shape, np.uint8)
    low, high = finite.min(), finite.max()
    _LOG.info("%d values of an image are not finite", values.size - finite.size)
    return np.nan_to_num(values, nan=low, neginf=low, posinf=high)


def _are_whole(values: npt.NDArray[Any]) -> bool:
    return values.dtype.kind != "f" or all((plane == np.rint(plane)).all() for plane in values)


def _spacing(given: Any) -> tuple[float, float, float]:
    is_three = isinstance(given, list) and len(given) == 3
    numbers = [v for v in given if isinstance(v, int | float)] if is_three else []
    if len(numbers) == 3 and all(1e-6 < value < 1e6 for value in numbers):
        first, second, third = map(float, numbers)
        return first, second, third
    return 1.0, 1.0, 1.0
