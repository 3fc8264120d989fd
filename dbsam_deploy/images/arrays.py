"""Pictures and arrays that a program already holds, as the `Volume` that a file would give."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..core.contract import MAX_IMAGE_PIXELS
from ..core.errors import InputError
from ..files.damage import DAMAGED, reason_of
from .intensity import STORED, Intensity, Window, to_uint8
from .scans import check_channels_last, check_voxels
from .volumes import Volume, load_pixels, picture_values, read_image

ImageLike = Any
"""A path, a `Volume`, a PIL image, or numbers: NumPy, nested lists or a torch tensor."""


class ReadOptions(TypedDict, total=False):
    """What a file leaves open, see `read_image`.

    Attributes:
        window: (level, width) that maps stored values to 0–255, or "file".
        series: of a DICOM folder.
        volume: which one of a 4D NIfTI file, from 0.
    """

    window: Window | str | None
    series: str | int | None
    volume: int | None


def as_volume(
    image: ImageLike,
    *,
    window: Window | str | None = None,
    series: str | int | None = None,
    volume: int | None = None,
) -> Volume:
    """An image in any form as slices of 0–255.

    Numbers are (H, W) grey, (H, W, 3) RGB, (H, W, 4) RGBA (laid over black) or slices (D, H, W),
    (D, H, W, 1) or (D, H, W, 3); (3, H, W) may be either and is refused. A torch tensor may be
    (C, H, W) or (1, C, H, W) too. uint8 is taken as it is; so are whole numbers
    within 0–255 of any type, grey or colour. Floats within 0–1 become 0–255. Everything else goes
    the way of a file, see `intensity.to_uint8`; `Volume.intensity` says what was done.

    Args:
        image: see `ImageLike`.
        window: (level, width) that maps values to 0–255, as for a file, see `read_image`.
        series: of a DICOM folder, see `read_image`.
        volume: which one of a 4D NIfTI file, from 0.

    Raises:
        InputError: not an image, or see `read_image`.
        EngineError: a file whose format's extra is not installed.
    """
    if isinstance(image, Volume):
        if window is not None or series is not None or volume is not None:
            raise InputError("this image was read before: give window and series to read_image")
        return image
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image), window=window, series=series, volume=volume)
    if isinstance(window, str) or series is not None or volume is not None:
        raise InputError('the window "file", a series and a volume are of files')
    if isinstance(image, Image.Image):
        values, notes = _picture(image)
        pixels, intensity = to_uint8(values[None], window, Path("picture"), notes=notes)
        return Volume(Path("picture"), "picture", pixels, intensity)
    return _from_numbers(_numbers(image), window)


def _picture(image: Image.Image) -> tuple[npt.NDArray[Any], tuple[str, ...]]:
    """Values of an open picture, and remarks on what was converted.

    Raises:
        InputError: no pixels or too many, or a picture whose file turns out to be damaged.
    """
    if not 0 < image.width * image.height <= MAX_IMAGE_PIXELS:
        raise InputError(
            f"a PIL image of {image.width}×{image.height} pixels: expected 1–{MAX_IMAGE_PIXELS}"
        )
    try:
        load_pixels(image)
        return picture_values(image)
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(
            f"a PIL image of mode {image.mode} that cannot be read: {reason_of(error)}; is its "
            "file whole, and was it still open?"
        ) from error


def is_tensor(value: Any) -> bool:
    """Whether this is a torch tensor, which need not be imported for it."""
    return hasattr(value, "detach") and hasattr(value, "cpu")


def as_array(name: str, value: Any) -> npt.NDArray[Any]:
    """Numbers of any form as NumPy has them; may share the memory of `value`.

    Args:
        name: what it is, for messages.
        value: an array, nested lists or a torch tensor.

    Raises:
        InputError: no array, or one with masked values.
    """
    try:
        if is_tensor(value):
            value = value.detach().cpu()
            # NumPy has no bfloat16.
            value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{name} of {type(value).__name__} is no array: {error}") from error
    if np.ma.is_masked(value):
        raise InputError(
            f"{name} is an array with masked values, which would count: fill them first, for "
            "example with .filled(0)"
        )
    return array


def _numbers(image: Any) -> npt.NDArray[Any]:
    """(H, W), (H, W, C) or (D, H, W) of whatever NumPy can read.

    Raises:
        InputError: not real numbers of such a shape, or too many.
    """
    channels_first, values = is_tensor(image), as_array("an image", image)
    if values.dtype.kind not in "buif":
        raise InputError(
            f"an image of {type(image).__name__} with values of type {values.dtype}: expected a "
            "path, a PIL image, or real numbers of shape (H, W), (H, W, 3) or (H, W, 4)"
        )
    values = _channels_last(values) if channels_first else values
    if values.ndim == 3 and not channels_first:
        check_channels_last(values.shape, "image", "three slices as (3, H, W, 1)")
    if values.ndim in (3, 4) and values.shape[-1] == 1:
        values = values[..., 0]
    slices = values.ndim == 3 or (values.ndim == 4 and values.shape[3] == 3)
    if not (values.ndim == 2 or slices) or 0 in values.shape:
        raise InputError(
            f"image of shape {values.shape}: expected (H, W), (H, W, 3), (H, W, 4) or slices "
            "(D, H, W) or (D, H, W, 3), none of them 0"
        )
    if values.ndim == 2 or _is_colour(values):
        check_voxels((1, *values.shape[:2]), Path("array"))
    else:
        check_voxels(values.shape[:3], Path("array"), values.itemsize)
    return values


def _channels_last(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(C, H, W) or (1, C, H, W), as torch has it, as (H, W, C); other shapes as they are."""
    if values.ndim == 4 and len(values) == 1:
        values = values[0]
    first = values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[2] not in (3, 4)
    return values.transpose(1, 2, 0) if first else values


def _is_colour(values: npt.NDArray[Any]) -> bool:
    return values.ndim == 3 and values.shape[2] in (3, 4)


def _from_numbers(values: npt.NDArray[Any], window: Window | None) -> Volume:
    path, given, known = Path("array"), values, None
    if window is None:
        values, known = _known_range(values)
    notes: tuple[str, ...] = ()
    colour = _is_colour(values)
    if colour and values.shape[2] == 4:
        values, notes = _over_black(values)
    stack = values[None] if values.ndim == 2 or colour else values
    pixels, intensity = to_uint8(stack, window, path)
    intensity = (intensity if known is None else known).with_notes(*notes)
    if np.may_share_memory(pixels, given):  # the caller may write to it, a result must not change
        pixels = pixels.copy()
    return Volume(path, "array", pixels, intensity)


def _known_range(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], Intensity | None]:
    """Values whose range is known by convention as uint8, and how; others as they are.

    Whole numbers within 0–255 are meant as such, whatever type holds them: a list of them has no
    type, and a picture keeps its brightness as int16 or float. A scan in so few values is brought
    to the full range by a window.
    """
    if values.dtype == np.bool_:
        how = Intensity("range", 0, 1, "false 0, true 255")
        return values.astype(np.uint8) * np.uint8(255), how
    if values.dtype == np.uint8 or not np.isfinite(values).all():
        return values, None
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and low >= 0 and 0 < high <= 1:
        how = Intensity("range", 0, 1, "0–1 to 0–255")
        return np.rint(values.astype(np.float64) * 255).astype(np.uint8), how
    if low >= 0 and high <= 255 and (values == np.rint(values)).all():
        return values.astype(np.uint8), dataclasses.replace(STORED, text="0–255 as given")
    return values, None


def _over_black(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], tuple[str, ...]]:
    """(H, W, 4) RGBA laid over black.

    Raises:
        InputError: a range in which opaque has no known value.
    """
    if values.dtype != np.uint8:
        raise InputError(
            f"RGBA values of type {values.dtype}: expected uint8, whole numbers within 0–255 or "
            "floats within 0–1; or drop the fourth channel"
        )
    return picture_values(Image.fromarray(np.ascontiguousarray(values)))
