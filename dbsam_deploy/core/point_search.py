"""Boxes to try for a click, for weights that were trained with boxes and ignore points.

Such weights answer a point with an empty mask. A box that happens to fit gives the object, and the
decoder's own estimate of its IoU says which of six does. Wider and higher ones beside the squares
took four times as long and were chosen where they were worse (docs/facts.md).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from .masks import Prediction

SIZES = (0.05, 0.08, 0.13, 0.21, 0.34, 0.55)
"""Sides of the squares around a click, as a part of the slice's longer side."""
GROWTHS = (0.05, 0.1, 0.2, 0.35, 0.5)
"""How far a box goes beyond what it has to hold, as a part of the latter's size."""
MOST_BOXES = 2 + 2 * len(GROWTHS)
"""That any search tries: `boxes_past` and the box itself."""
Boxes = npt.NDArray[np.float64]
MarkedPixels = npt.NDArray[np.bool_]


def boxes_around(marked: npt.NDArray[np.float64], size: tuple[int, int]) -> Boxes:
    """(6, 4) x0, y0, x1, y1 that hold what is marked in their middle, inside a slice.

    Args:
        marked: (4,) box around it: a pixel that was clicked, or a stroke.
        size: height and width of the slice.
    """
    middle = np.array([marked[[0, 2]].mean(), marked[[1, 3]].mean()])
    half = np.maximum(2.0, np.array(SIZES) * max(size))[:, None] / 2
    low, high = np.minimum(middle - half, marked[:2]), np.maximum(middle + half, marked[2:])
    return inside(np.concatenate([low, high], axis=1), size)


def boxes_past(
    box: npt.NDArray[np.float64],
    earlier: npt.NDArray[np.float64] | None,
    size: tuple[int, int],
    *,
    where_new: Collection[float] = GROWTHS,
) -> Boxes:
    """Boxes that hold what `box` does and go beyond it, on all sides or where it is new.

    Args:
        box: (4,) around all that the object shall have.
        earlier: (4,) around what it has; its sides that `box` shares stay in some of the boxes.
        size: of the slice.
        where_new: the growths that are also tried where `box` is new alone.
    """
    width, height = max(box[2] - box[0], 4.0), max(box[3] - box[1], 4.0)
    out = np.array([-width, -height, width, height])
    found = [box]
    moved = np.ones(4, bool) if earlier is None else np.asarray(box != earlier)
    for growth in GROWTHS:
        found.append(box + growth * out)
        if growth in where_new and moved.any() and not moved.all():
            found.append(box + growth * out * moved)
    return inside(np.array(found), size)


def inside(boxes: Boxes, size: tuple[int, int]) -> Boxes:
    """Boxes clipped to a slice, none thinner than a pixel."""
    height, width = size
    low = np.clip(boxes[:, :2], 0, [width - 1, height - 1])
    high = np.clip(boxes[:, 2:], low + 1, [width, height])
    return np.concatenate([low, high], axis=1)


def boxes_beside(
    box: npt.NDArray[np.float64], marked: npt.NDArray[np.float64], size: tuple[int, int]
) -> Boxes:
    """(5, 4) a box, and what is left of it on each side of what is marked, (4,)."""
    cuts = np.tile(box, (5, 1))
    for number, side in enumerate((2, 3, 0, 1)):
        cuts[number + 1, side] = marked[(side + 2) % 4]
    return inside(cuts, size)


def best_answer(
    answers: Prediction,
    wanted: MarkedPixels,
    unwanted: MarkedPixels | None = None,
    before: MarkedPixels | None = None,
    *,
    likeness: float = 1.0,
) -> int | None:
    """Which answer is the surest of those that obey, and the most like what there was.

    Args:
        answers: one mask (N, 1, H, W) for each box.
        wanted: (H, W) pixels of which the object has as many as any answer has.
        unwanted: (H, W) pixels of which it has as few as any answer has.
        before: (H, W) mask that is corrected.
        likeness: what its IoU with an answer counts beside the predicted one.

    Returns:
        None where no mask holds any of what is wanted, or all are empty.
    """
    masks = answers.masks[:, 0].astype(bool)
    hits = (masks & wanted).sum((1, 2)) if wanted.any() else masks.any((1, 2)).astype(int)
    faults = np.zeros(len(masks), int) if unwanted is None else (masks & unwanted).sum((1, 2))
    score = answers.ious[:, 0].astype(float)
    if before is not None:
        score += likeness * overlap(masks, before)
    order = order_of(hits, faults, score)
    return order[0] if order else None


def order_of(
    hits: npt.NDArray[np.integer], faults: npt.NDArray[np.integer], score: npt.NDArray[np.floating]
) -> list[int]:
    """Which answers obey, the one of the highest score first; none where none has a hit.

    Args:
        hits: (N,) how much each answer has of what is wanted.
        faults: (N,) how much it has of what is not.
        score: (N,) how good it is otherwise.
    """
    if not hits.size or hits.max() == 0:
        return []
    obeying = hits >= 0.9 * hits.max()
    obeying &= faults == faults[obeying].min()
    return [int(i) for i in np.argsort(-score, kind="stable") if obeying[i]]


def overlap(masks: MarkedPixels, other: MarkedPixels) -> npt.NDArray[np.float64]:
    """(N,) IoU of masks (N, H, W) with one (H, W)."""
    both, either = (masks & other).sum((1, 2)), (masks | other).sum((1, 2))
    return np.asarray(both / np.maximum(1, either))
