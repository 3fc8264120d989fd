"""Prompt sets as SAM's tokens: labelled points, a box as two corners, or a closing "not a point".

The client joins boxes and points to tokens in the image frame, the server checks them again. Runs
beside `imaging` inside Triton's Python models, so it needs only NumPy.
"""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from .contract import (
    HAS_MASK_INPUT,
    MASK_INPUT,
    MAX_MASK_PIXELS,
    MAX_POINTS,
    POINT_COORDS,
    POINT_LABELS,
)
from .errors import InputError
from .imaging import (
    Arrays,
    FloatArray,
    Preprocessing,
    check_boxes,
    check_points,
    to_model_frame,
)

NO_POINT, TOP_LEFT, BOTTOM_RIGHT = -1, 2, 3
IntArray = npt.NDArray[np.int32]


class Places(TypedDict, total=False):
    """Where N prompt sets point: at boxes, at points, or at both.

    Attributes:
        boxes: (N, 4) x0, y0, x1, y1 in the image frame.
        point_coords: (N, P, 2) x, y in the image frame.
        point_labels: (N, P) 1 foreground, 0 background, -1 no point.
    """

    boxes: npt.NDArray[Any] | None
    point_coords: npt.NDArray[Any] | None
    point_labels: npt.NDArray[Any] | None


class PromptArrays(Places, total=False):
    """All that a request may say of N prompt sets.

    Attributes:
        mask_input: (N, 4G, 4G) float logits of an earlier answer.
    """

    mask_input: npt.NDArray[Any] | None


class DecoderPrompts(PromptArrays, total=False):
    """Prompt sets, and how a decoder answers them.

    Attributes:
        multimask: the three alternatives (by default False: the single mask).
        adapt_points: answer points as the model's `points` say (the default); else as its decoder
            does.
    """

    multimask: bool
    adapt_points: bool


def boxes_alone(
    *,
    boxes: npt.NDArray[Any] | None = None,
    multimask: bool = False,
    adapt_points: bool = True,
    **others: Any,
) -> npt.NDArray[Any] | None:
    """The boxes of `DecoderPrompts` that are nothing else, which the box decoder takes; or None."""
    return None if multimask or any(one is not None for one in others.values()) else boxes


def join_prompts(
    original_size: tuple[int, int],
    *,
    boxes: npt.NDArray[Any] | None = None,
    point_coords: npt.NDArray[Any] | None = None,
    point_labels: npt.NDArray[Any] | None = None,
) -> tuple[FloatArray, IntArray]:
    """Tokens of N prompt sets, points first, in SAM's order.

    Args:
        original_size: height and width of the image.
        boxes: (N, 4) x0, y0, x1, y1 in the image frame.
        point_coords: (N, P, 2) x, y in the image frame.
        point_labels: (N, P) 1 foreground, 0 background, -1 no point.

    Returns:
        (N, T, 2) float32 coordinates in the image frame and (N, T) int32 labels.

    Raises:
        InputError: no prompt, unusable points or boxes, or not as many of one as of the other.
    """
    if (point_coords is None) != (point_labels is None):
        raise InputError("point_coords and point_labels go together: one is missing")
    coords: list[FloatArray] = []
    labels: list[IntArray] = []
    if point_coords is not None and point_labels is not None:
        points, marks = check_points(point_coords, point_labels, original_size)
        coords.append(points)
        labels.append(marks)
    if boxes is not None:
        corners = check_boxes(boxes, original_size).reshape(-1, 2, 2)
        coords.append(corners)
        labels.append(np.tile(np.array([TOP_LEFT, BOTTOM_RIGHT], np.int32), (len(corners), 1)))
    elif coords:
        coords.append(np.zeros((len(coords[0]), 1, 2), np.float32))
        labels.append(np.full((len(labels[0]), 1), NO_POINT, np.int32))
    else:
        raise InputError("no prompt: give boxes, points, or both")
    if len({len(item) for item in coords}) != 1:
        raise InputError(
            f"{len(coords[0])} point prompts but {len(coords[1])} boxes: expected one each"
        )
    return np.concatenate(coords, axis=1), np.concatenate(labels, axis=1)


def check_tokens(
    point_coords: npt.NDArray[Any],
    point_labels: npt.NDArray[Any],
    original_size: tuple[int, int],
) -> tuple[FloatArray, IntArray]:
    """Return tokens as `join_prompts` makes them, if they are that.

    Args:
        point_coords: (N, T, 2) x, y in the image frame.
        point_labels: (N, T); the last token is -1, or the last two are 2 and 3.
        original_size: height and width of the image.

    Raises:
        InputError: shapes differ, a set does not end as it must, or a point or box is unusable.
    """
    if point_coords.ndim != 3 or point_coords.shape[2] != 2:
        raise InputError(f"point_coords of shape {point_coords.shape}: expected (N, T, 2)")
    if point_labels.shape != point_coords.shape[:2]:
        raise InputError(
            f"point_labels of shape {point_labels.shape}: expected {point_coords.shape[:2]}, "
            "one label a point"
        )
    count, tokens = point_labels.shape
    if count == 0 or not 2 <= tokens <= MAX_POINTS:
        raise InputError(
            f"{count} prompt sets of {tokens} points: expected at least 1 set of 2–{MAX_POINTS} "
            'points, box corners or the closing "not a point" included'
        )
    if (point_labels[:, -2:] == (TOP_LEFT, BOTTOM_RIGHT)).all():
        points = slice(0, tokens - 2)
        boxes = point_coords[:, -2:].reshape(count, 4)
    elif (point_labels[:, -1] == NO_POINT).all():
        points, boxes = slice(0, tokens - 1), None
    else:
        raise InputError(
            "point_labels must all end with 2, 3 (a box's top-left and bottom-right corner) or all "
            "with -1 (no box)"
        )
    given = point_labels[:, points].shape[1] > 0
    return join_prompts(
        original_size,
        boxes=boxes,
        point_coords=point_coords[:, points] if given else None,
        point_labels=point_labels[:, points] if given else None,
    )


def set_feed(
    coords: FloatArray,
    labels: IntArray,
    masks: FloatArray | None,
    has_mask: npt.NDArray[Any] | None,
    size: tuple[int, int],
    how: Preprocessing,
) -> Arrays:
    """Checked prompt sets as `prompt_decoder` takes them, without its batch axis.

    SAM 2's take a closing "not a point" behind a box too.

    Args:
        coords: (N, T, 2) as `join_prompts` returns them, in the image frame.
        labels: (N, T) likewise.
        masks: (N, 4G, 4G) earlier logits; None for zeros.
        has_mask: (N,) 1 to use them; None for 0.
        size: height and width of the image.
        how: mode and sizes of the model.

    Raises:
        InputError: with that point, a set is longer than `MAX_POINTS`.
    """
    count, side = len(coords), how.mask_side
    if how.high_res and labels[0, -1] != NO_POINT:
        coords = np.concatenate([coords, np.zeros((count, 1, 2), np.float32)], axis=1)
        labels = np.concatenate([labels, np.full((count, 1), NO_POINT, np.int32)], axis=1)
        if labels.shape[1] > MAX_POINTS:
            most = MAX_POINTS - 3
            raise InputError(f"{most + 1} points with a box: SAM 2 takes at most {most} with one")
    masks = np.zeros((count, side, side), np.float32) if masks is None else masks
    has_mask = np.zeros(count, np.float32) if has_mask is None else has_mask
    return {
        # "Not a point" keeps zero coordinates: zero maps to zero.
        POINT_COORDS: to_model_frame(coords, size, how),
        POINT_LABELS: labels,
        MASK_INPUT: masks[:, None],
        HAS_MASK_INPUT: np.asarray(has_mask, np.float32),
    }


def check_mask_input(mask_input: npt.NDArray[Any], count: int, side: int) -> FloatArray:
    """Return earlier logits as float32 if there is one finite map for each prompt set.

    Args:
        mask_input: (N, 4G, 4G) logits on the mask grid.
        count: number N of prompt sets.
        side: 4G.

    Raises:
        InputError: another shape, or values that are not finite.
    """
    mask_input, expected = np.asarray(mask_input), (count, side, side)
    if mask_input.shape != expected or mask_input.dtype.kind != "f":
        raise InputError(
            f"mask_input {mask_input.dtype}{mask_input.shape}: expected float logits {expected}"
        )
    values = np.asarray(mask_input, np.float32)
    if not np.isfinite(values).all():
        raise InputError("mask_input holds NaN or infinity: expected finite logits")
    return values


def check_mask_pixels(masks: int, original_size: tuple[int, int]) -> None:
    """Refuse a request whose answer would not fit.

    Raises:
        InputError: `masks` masks of `original_size` are more than `MAX_MASK_PIXELS` pixels.
    """
    pixels = masks * original_size[0] * original_size[1]
    if pixels > MAX_MASK_PIXELS:
        raise InputError(
            f"{masks} masks of {original_size[0]}×{original_size[1]} pixels are {pixels} mask "
            f"pixels: at most {MAX_MASK_PIXELS} in one request; send fewer prompts at a time"
        )
