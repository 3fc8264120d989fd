"""Kinds of prompts beside a box alone: clicks, boxes with clicks, and answers to be corrected."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from ..core.imaging import FloatArray
from ..core.masks import mask_box
from ..verification.cases import deepest_point
from .recipe import PromptShares

KINDS = ("box", "click", "box_click", "correction")
"""In the order of `PromptShares`; an example names its kind by its number here."""
WRONG_SIDE = 0.25
"""How far a wrong side of a box lies off, as a share of the box."""


def draw_kind(shares: PromptShares, rng: np.random.Generator) -> int:
    """A kind's number in `KINDS`."""
    weights = np.array(list(asdict(shares).values()))
    return int(rng.choice(len(KINDS), p=weights / weights.sum()))


def draw_clicks(
    kind: int,
    masks: npt.NDArray[np.bool_],
    boxes: FloatArray,
    rng: np.random.Generator,
) -> tuple[FloatArray, FloatArray, npt.NDArray[np.int64]]:
    """Boxes as they are given, and one click each, where the kind has one.

    Args:
        kind: see `KINDS`.
        masks: (N, H, W) bool, the objects.
        boxes: (N, 4) in the image frame.
        rng: decides.

    Returns:
        Boxes (N, 4) and clicks (N, 2) in the image frame, and the clicks' labels (N,): 1 inside,
        0 outside the object. For a box alone the clicks mean nothing.
    """
    given, clicks, labels = boxes.copy(), np.zeros((len(boxes), 2), np.float32), []
    for i, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        labels.append(1)
        if KINDS[kind] == "click":
            clicks[i] = _inside(mask, rng)
        elif KINDS[kind] == "box_click":
            given[i], clicks[i], labels[i] = _box_click(mask, box, rng)
    return given, clicks, np.array(labels, np.int64)


def _inside(mask: npt.NDArray[np.bool_], rng: np.random.Generator) -> FloatArray:
    """The object's deepest point, or any of its pixels, as often."""
    if rng.random() < 0.5:
        return deepest_point(mask)
    places = np.flatnonzero(mask)
    row, column = divmod(int(places[rng.integers(len(places))]), mask.shape[1])
    return np.array([column + 0.5, row + 0.5], np.float32)


def _box_click(
    mask: npt.NDArray[np.bool_], box: FloatArray, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray, int]:
    """A box with a side that cuts the object or holds too much, and the click that says so."""
    side, is_outwards = int(rng.integers(4)), bool(rng.random() < 0.5)
    if rng.random() < 1 / 3:
        return box, _inside(mask, rng), 1
    height, width = mask.shape
    moved = (mask_box(mask) if not is_outwards else box).astype(np.float32)
    step = WRONG_SIDE * (moved[2] - moved[0], moved[3] - moved[1])[side % 2]
    moved[side] += step if (side >= 2) == is_outwards else -step
    moved = np.clip(np.round(moved), 0, (width, height, width, height)).astype(np.float32)
    rows, columns = np.ogrid[:height, :width]
    held = (columns >= moved[0]) & (columns < moved[2]) & (rows >= moved[1]) & (rows < moved[3])
    wrong = held & ~mask if is_outwards else mask & ~held
    if not wrong.any() or moved[2] - moved[0] < 1 or moved[3] - moved[1] < 1:
        return box, _inside(mask, rng), 1
    return moved, deepest_point(wrong), int(not is_outwards)
