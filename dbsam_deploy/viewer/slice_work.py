"""What one mark makes of one slice: which boxes the model is asked with, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from ..prediction.point_search import best_answer, boxes_around, boxes_past
from ..volumes.planes import PlaneView
from ..volumes.slices import VolumeSlices
from ..volumes.stop_rules import MaskArray, mask_box

Clicks = tuple[tuple[int, int, bool], ...]
"""Row, column, whether the object has it; in the order of the clicks."""
DISC_RADIUS = 2
_LASSO_SLACK = 5
"""Side of the square by which a lasso is widened: two pixels to each side."""
_MOST_POINTS = 8
"""Of a stroke, that the model is told."""
_LARGEST_PIECE = 0.5
"""Of the mask, that one click outside may take away."""


@dataclass(frozen=True)
class Wish:
    """What the user said of one slice so far.

    Attributes:
        box: x0, y0, x1, y1, or None.
        clicks: see `Clicks`.
    """

    box: tuple[float, float, float, float] | None = None
    clicks: Clicks = ()

    def with_clicks(self, *clicks: tuple[int, int, bool]) -> Wish:
        """The same with further clicks; one on an earlier one's pixel replaces it."""
        new = {click[:2] for click in clicks}
        return replace(self, clicks=(*(c for c in self.clicks if c[:2] not in new), *clicks))


class SliceFound(NamedTuple):
    """A slice's mask, and how sure the model is of it, where it was asked."""

    mask: MaskArray
    iou: float | None


class SliceWork:
    """A model asked about one slice.

    Args:
        slices: of the volume.
        view: the plane.
        index: of the slice.
        before: the object there, (H, W).
    """

    def __init__(
        self, slices: VolumeSlices, view: PlaneView, index: int, before: MaskArray
    ) -> None:
        self._slices, self._view, self.index, self.before = slices, view, index, before

    def box(self, wish: Wish) -> SliceFound:
        """The object in the box, less what is clicked away."""
        assert wish.box is not None  # noqa: S101 - for mypy
        outside = [click for click in wish.clicks if not click[2]]
        found = self._ask_best(np.array([wish.box]), None)
        if outside and found.mask.any():
            found = self._ask_outside(np.array(wish.box), outside)
        return self._obeying(found, wish.clicks)

    def clicks(self, wish: Wish) -> SliceFound:
        """The object after a click, the last of the wish."""
        row, column, is_inside = wish.clicks[-1]
        if bool(self.before[row, column]) == is_inside:
            return SliceFound(self.before, None)
        if is_inside:
            wanted = self._mask_of([c for c in wish.clicks if c[2]])
            return self._obeying(self._including(wanted, wish), wish.clicks)
        around = mask_box(self.before) if wish.box is None else np.array(wish.box)
        outside = [click for click in wish.clicks if not click[2]]
        return self._obeying(self._ask_outside(around, outside), wish.clicks)

    def stroke(self, stroke: MaskArray, is_inside: bool, wish: Wish) -> SliceFound:
        """The object after voxels were painted, which it has then, or has not."""
        if is_inside:
            found = self._including(stroke, wish)
            return SliceFound(found.mask | stroke, found.iou)
        if not (self.before & stroke).any():
            return SliceFound(self.before, None)
        places = np.argwhere(stroke)
        chosen = places[np.linspace(0, len(places) - 1, min(len(places), _MOST_POINTS)).astype(int)]
        outside = [(int(row), int(column), False) for row, column in chosen]
        around = mask_box(self.before) if wish.box is None else np.array(wish.box)
        found = self._ask_outside(around, outside)
        return SliceFound(found.mask & ~stroke, found.iou)

    def area(self, area: MaskArray, is_inside: bool, *, is_box: bool) -> SliceFound:
        """The object after what it has in an area is added to it, or taken away.

        Args:
            area: (H, W), filled.
            is_inside: add it.
            is_box: a box; else the outline is believed to two pixels.
        """
        found = self._ask_best(mask_box(area)[None].astype(np.float64), None)
        inside = found.mask & (area if is_box else _wider(area))
        if is_inside:
            return SliceFound(self.before | (inside if inside.any() else area), found.iou)
        taken = inside if (inside & self.before).any() else area
        return SliceFound(self.before & ~taken, None)

    def _including(self, wanted: MaskArray, wish: Wish) -> SliceFound:
        """The object with what is wanted, by the best of several boxes."""
        size = self._view.size
        if not self.before.any() and wish.box is None:
            return self._ask_best(boxes_around(mask_box(wanted).astype(float), size), wanted)
        earlier = np.array(wish.box if wish.box is not None else mask_box(self.before), float)
        new = mask_box(wanted).astype(float)
        both = np.concatenate([np.minimum(earlier, new)[:2], np.maximum(earlier, new)[2:]])
        found = self._ask_best(boxes_past(both, earlier, size), wanted)
        if not (found.mask & wanted).any():
            return SliceFound(self.before | wanted, found.iou)
        return found

    def _ask_best(self, boxes: npt.NDArray[np.float64], wanted: MaskArray | None) -> SliceFound:
        """The best answer to boxes, or nothing where none has what is wanted."""
        answers = self._slices.decode(self._view, self.index, boxes=boxes)
        best = 0 if wanted is None else best_answer(answers, wanted)
        if best is None:
            return SliceFound(np.zeros(self._view.size, bool), None)
        return SliceFound(answers.masks[best, 0] != 0, float(answers.ious[best, 0]))

    def _ask_outside(
        self, box: npt.NDArray[np.floating], outside: Sequence[tuple[int, int, bool]]
    ) -> SliceFound:
        """A box with points outside the object, which box-trained weights understand."""
        places = [[column + 0.5, row + 0.5] for row, column, _ in outside]
        answer = self._slices.decode(
            self._view,
            self.index,
            boxes=np.asarray(box, float)[None],
            point_coords=np.array([places], float),
            point_labels=np.zeros((1, len(places)), np.int32),
        )
        return SliceFound(answer.masks[0, 0] != 0, float(answer.ious[0, 0]))

    def _obeying(self, found: SliceFound, clicks: Clicks) -> SliceFound:
        """The same with every clicked pixel as it was asked; the last click wins."""
        mask = found.mask.copy()
        for row, column, is_inside in clicks:
            if bool(mask[row, column]) != is_inside:
                mask[self._piece(mask, row, column, is_inside)] = is_inside
        for row, column, is_inside in clicks:
            mask[row, column] = is_inside
        return SliceFound(mask, found.iou)

    def _piece(self, mask: MaskArray, row: int, column: int, is_inside: bool) -> MaskArray:
        """What a click adds or takes away where the model did not: a small object, or a disc."""
        if not is_inside:
            pixel = np.array([column, row, column + 1, row + 1], float)
            boxes = boxes_around(pixel, self._view.size)
            alone = self._ask_best(boxes, self._mask_of([(row, column, True)])).mask
            if alone[row, column] and (alone & mask).sum() <= _LARGEST_PIECE * mask.sum():
                return alone
        rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
        return np.asarray((rows - row) ** 2 + (columns - column) ** 2 <= DISC_RADIUS**2)

    def _mask_of(self, clicks: Sequence[tuple[int, int, bool]]) -> MaskArray:
        mask = np.zeros(self._view.size, bool)
        for row, column, _ in clicks:
            mask[row, column] = True
        return mask


def _wider(area: MaskArray) -> MaskArray:
    grown = Image.fromarray(area.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(_LASSO_SLACK))
    return np.asarray(grown) != 0
