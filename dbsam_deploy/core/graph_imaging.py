"""What graphs take that resize images and make masks themselves, see `Geometry.pixels_in_graph`.

`imaging.preprocess` and `imaging.postprocess` stay the definition. Of whole grey values a graph
makes the same image bit for bit, or in mode lite_medsam one that differs by rounding; a mask may
differ where a logit is 0 but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .contract import (
    COLUMN_TAPS,
    COLUMN_WEIGHTS,
    IMAGE,
    MASK_LOGITS,
    MAX_SIDE_IN_GRAPH,
    PIXELS,
    ROW_TAPS,
    ROW_WEIGHTS,
)
from .imaging import (
    Arrays,
    ByteArray,
    Preprocessing,
    check_finite,
    check_image,
    check_mask_side,
    mask_stages,
    postprocess,
    preprocess,
    resize_image,
)
from .prompt_adapter import AT_ONCE
from .taps import FIXED_POINT, Taps, equal_taps, image_taps, mask_taps

_DIGITS = 2
"""Digits in base 256 of a grey value that is not whole."""

RunMasks = Callable[[Arrays], npt.NDArray[Any]]
"""Inputs of `contract.mask_bits_spec` → its output."""


def weights_are_whole(how: Preprocessing) -> bool:
    """Whether a graph resizes in whole numbers, as Pillow does, with `taps.FIXED_POINT` for 1."""
    return how.mode not in ("sam2", "lite_medsam")


def encoder_feed(image: npt.NDArray[Any], how: Preprocessing) -> Arrays:
    """What the encoder takes of an image, by name.

    Args:
        image: (H, W, 3) uint8 RGB.
        how: mode and size.

    Returns:
        The inputs of `contract.encoder_spec`, with a batch of one: the image as
        `imaging.preprocess` makes it, or its own pixels and how the graph resizes them. An image
        with a side above `MAX_SIDE_IN_GRAPH`, and every one in mode medsam, is resized here.

    Raises:
        InputError, EngineError: see `imaging.preprocess`.
    """
    if not how.pixels_in_graph:
        return {IMAGE: preprocess(image, how)}
    pixels, size = check_image(image), (image.shape[0], image.shape[1])
    if how.mode == "medsam" or max(size) > MAX_SIDE_IN_GRAPH:
        return _feed(PIXELS, *_resized(pixels, how))
    filled, side = how.pixel_size(size), how.image_size
    halved = size == (2 * filled[0], 2 * filled[1])
    rows = image_taps(how.mode, size[0], filled[0], side, halved=halved)
    columns = image_taps(how.mode, size[1], filled[1], side)
    return _feed(PIXELS, pixels, rows, columns)


def _resized(image: ByteArray, how: Preprocessing) -> tuple[ByteArray, Taps, Taps]:
    """Pixels that are resized already; those that are not whole as two digits side by side."""
    found, side = resize_image(image, how), how.image_size
    one = FIXED_POINT if weights_are_whole(how) else 1
    rows = equal_taps(found.shape[0], side, one)
    if found.dtype == np.uint8:
        return found, rows, equal_taps(found.shape[1], side, one)
    steps = np.rint(np.clip(found, 0, 255) * 256).astype(np.uint16)
    digits = np.concatenate([steps >> 8, steps & 255], axis=1).astype(np.uint8)
    return digits, rows, equal_taps(found.shape[1], side, one, _DIGITS)


def make_masks(
    low_res_masks: npt.NDArray[Any],
    original_size: tuple[int, int],
    how: Preprocessing,
    run: RunMasks,
    out: ByteArray | None = None,
) -> ByteArray:
    """`imaging.postprocess` by the graph that makes masks, where there is one.

    Masks of an image with a side above `MAX_SIDE_IN_GRAPH` are made here.

    Args:
        low_res_masks: (..., 4G, 4G) float32 logits.
        original_size: height and width of the image.
        how: the preprocessing that made the model frame.
        run: runs the graph, on a few masks at a time.
        out: (..., H, W) uint8 array to fill; a new one by default.

    Returns:
        (..., H, W) uint8, 1 inside the mask.

    Raises:
        InputError, EngineError: see `imaging.postprocess`.
    """
    if not how.pixels_in_graph or max(original_size) > MAX_SIDE_IN_GRAPH:
        return postprocess(low_res_masks, original_size, how, out)
    side = check_mask_side(low_res_masks, how)
    check_finite(low_res_masks)
    lead, (height, width) = low_res_masks.shape[:-2], original_size
    masks = np.empty((*lead, height, width), np.uint8) if out is None else out
    stages, bits = mask_stages(original_size, how), -(-width // 8) * 8
    rows = mask_taps(side, stages, 0, height)
    columns = mask_taps(side, stages, 1, bits).in_rows_of(8)
    logits, places = low_res_masks.reshape(-1, side, side), list(np.ndindex(*lead))
    for start in range(0, len(places), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        packed = run(_feed(MASK_LOGITS, logits[part], rows, columns))[0]
        for place, mask in zip(places[part], packed, strict=True):
            masks[place] = np.unpackbits(mask, axis=-1, count=width)
    return masks


def _feed(name: str, array: npt.NDArray[Any], rows: Taps, columns: Taps) -> Arrays:
    """An array and how it is resized, as a batch of one."""
    return {
        name: array[None],
        ROW_TAPS: rows.places[None],
        ROW_WEIGHTS: rows.weights[None],
        COLUMN_TAPS: columns.places[None],
        COLUMN_WEIGHTS: columns.weights[None],
    }
