"""What one mark makes of one slice: which boxes the model is asked with, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from ..core.contract import BOXES
from ..core.masks import Prediction, mask_box
from ..core.point_search import best_answer, boxes_around, boxes_beside, boxes_past
from ..core.points import BOX_TRAINED, PointRules
from ..volumes.logits import Question
from ..volumes.planes import PlaneView
from ..volumes.slices import VolumeSlices
from ..volumes.stop_rules import MaskArray

Clicks = tuple[tuple[int, int, bool], ...]
"""Row, column, whether the object has it; in the order of the clicks."""
DISC_RADIUS = 2
_LASSO_SLACK = 5
"""Side of the square by which a lasso is widened: two pixels to each side."""
_MOST_POINTS = 8
"""Of a stroke, that the model is told."""
_LIKENESS = 0.5
"""Of an object that is added to, which every answer holds anyway (docs/facts.md)."""
_WHERE_NEW = (0.1, 0.35)
"""Growths on new sides alone: eight boxes in all, which are decoded at once (docs/facts.md)."""
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

    def box(self, box: Sequence[float] | npt.NDArray[np.float64]) -> SliceFound:
        """The object in a box, (4,) x0, y0, x1, y1."""
        return self._surest(self._answers(np.array([box], float)), self._nothing)

    @property
    def _rules(self) -> PointRules:
        """Of the model; of a server that does not say it, those of weights that know boxes."""
        return self._slices.shared.points or BOX_TRAINED

    def clicks(self, wish: Wish) -> SliceFound:
        """The object after a click, the last of the wish."""
        row, column, is_inside = wish.clicks[-1]
        if bool(self.before[row, column]) == is_inside:
            return SliceFound(self.before, None)
        if is_inside:
            wanted = self._mask_of([c for c in wish.clicks if c[2]])
            is_first = not self.before.any() and wish.box is None
            if (self._rules.first if is_first else self._rules.past_box) == "native":
                found = self._pointed(wish, is_first=is_first)
            else:
                found = self._including(wanted, wish)
            return self._obeying(found, wish.clicks)
        unwanted = self._mask_of([(row, column, False)])
        outside = [click for click in wish.clicks if not click[2]]
        return self._obeying(self._excluding(unwanted, outside, wish), wish.clicks)

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
        found = self._excluding(stroke, outside, wish)
        return SliceFound(found.mask & ~stroke, found.iou)

    def area(self, area: MaskArray, is_inside: bool, *, is_box: bool) -> SliceFound:
        """The object after what it has in an area is added to it, or taken away.

        Args:
            area: (H, W), filled.
            is_inside: add it.
            is_box: a box; else the outline is believed to two pixels.
        """
        found = self._surest(self._answers(mask_box(area)[None].astype(float)), self._nothing)
        inside = found.mask & (area if is_box else _wider(area))
        if is_inside:
            return SliceFound(self.before | (inside if inside.any() else area), found.iou)
        taken = inside if (inside & self.before).any() else area
        return SliceFound(self.before & ~taken, None)

    def _including(self, wanted: MaskArray, wish: Wish) -> SliceFound:
        """The object with what is wanted, by the best of several boxes."""
        size, new = self._view.size, mask_box(wanted).astype(float)
        unwanted = self._mask_of([click for click in wish.clicks if not click[2]])
        if not self.before.any() and wish.box is None:
            return self._surest(self._answers(boxes_around(new, size)), wanted, unwanted)
        earlier = np.array(wish.box if wish.box is not None else mask_box(self.before), float)
        both = np.concatenate([np.minimum(earlier, new)[:2], np.maximum(earlier, new)[2:]])
        answers = self._answers(boxes_past(both, earlier, size, where_new=_WHERE_NEW))
        # What is marked inside takes nothing away; an empty answer stays one.
        masks = (answers.masks | self.before) * answers.masks.any((2, 3), keepdims=True)
        united = replace(answers, masks=masks)
        found = self._surest(united, wanted, unwanted, self.before, likeness=_LIKENESS)
        return SliceFound(found.mask if found.mask.any() else self.before, found.iou)

    def _pointed(self, wish: Wish, *, is_first: bool) -> SliceFound:
        """The object with all clicks as points, of weights that know them."""
        places = np.array([[[column + 0.5, row + 0.5] for row, column, _ in wish.clicks]])
        marks = np.array([[int(is_inside) for _, _, is_inside in wish.clicks]], np.int32)
        boxes = None
        if not is_first:
            boxes = np.array([mask_box(self.before) if wish.box is None else wish.box], float)
        answers = self._answers(
            boxes,
            point_coords=places,
            point_labels=marks,
            multimask=is_first and len(wish.clicks) == 1,
        )
        best = int(np.argmax(answers.ious[0]))
        mask, iou = answers.masks[0, best] != 0, float(answers.ious[0, best])
        return SliceFound(mask, iou) if mask.any() else SliceFound(self.before, None)

    def _excluding(
        self, unwanted: MaskArray, outside: Sequence[tuple[int, int, bool]], wish: Wish
    ) -> SliceFound:
        """The object without what is unwanted, by points outside it or by boxes beside them.

        Box-trained weights understand a box with points outside the object, mostly.
        """
        box = np.array(mask_box(self.before) if wish.box is None else wish.box, float)
        places = np.array([[[column + 0.5, row + 0.5] for row, column, _ in outside]])
        marks = np.zeros(places.shape[:2], np.int32)
        pointed = self._answers(box[None], point_coords=places, point_labels=marks)
        marked = mask_box(unwanted).astype(float)
        beside = self._answers(boxes_beside(box, marked, self._view.size)[1:])
        answers = Prediction(
            np.concatenate([pointed.masks, beside.masks]),
            np.concatenate([pointed.ious, beside.ious]),
        )
        wanted = self._mask_of([click for click in wish.clicks if click[2]])
        found = self._surest(answers, wanted, unwanted, self.before)
        return SliceFound(found.mask if found.mask.any() else self.before, found.iou)

    def _answers(self, boxes: npt.NDArray[np.float64] | None, **prompts: Any) -> Prediction:
        """The decoder's own: what is tried in its place is chosen here."""
        several = bool(prompts.pop("multimask", False))
        given = prompts if boxes is None else {BOXES: boxes, **prompts}
        question = Question(self._view.axis, self.index, given, several, adapt_points=False)
        return self._slices.decode(question)

    def _surest(self, answers: Prediction, *asked: MaskArray, likeness: float = 1.0) -> SliceFound:
        """The best answer (`point_search.best_answer`), or nothing."""
        best = best_answer(answers, *asked, likeness=likeness)
        if best is None:
            return SliceFound(self._nothing, None)
        return SliceFound(answers.masks[best, 0] != 0, float(answers.ious[best, 0]))

    @property
    def _nothing(self) -> MaskArray:
        return np.zeros(self._view.size, bool)

    def _obeying(self, found: SliceFound, clicks: Clicks) -> SliceFound:
        """The same with every clicked pixel as it was asked; the last click wins.

        Earlier ones had their piece when they were asked: a disc is theirs now, without the model.
        """
        mask = found.mask.copy()
        for row, column, is_inside in clicks:
            if bool(mask[row, column]) == is_inside:
                continue
            is_new = (row, column) == clicks[-1][:2]
            alone = self._small_object(mask, row, column) if is_new and not is_inside else None
            mask[_disc(mask, row, column) if alone is None else alone] = is_inside
        for row, column, is_inside in clicks:
            mask[row, column] = is_inside
        return SliceFound(mask, found.iou)

    def _small_object(self, mask: MaskArray, row: int, column: int) -> MaskArray | None:
        """What the model finds at a pixel, where that is a small part of a mask."""
        pixel = np.array([column, row, column + 1, row + 1], float)
        answers = self._answers(boxes_around(pixel, self._view.size))
        alone = self._surest(answers, self._mask_of([(row, column, True)])).mask
        is_small = (alone & mask).sum() <= _LARGEST_PIECE * mask.sum()
        return alone if alone[row, column] and is_small else None

    def _mask_of(self, clicks: Sequence[tuple[int, int, bool]]) -> MaskArray:
        mask = self._nothing
        for row, column, _ in clicks:
            mask[row, column] = True
        return mask


def _disc(mask: MaskArray, row: int, column: int) -> MaskArray:
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    return np.asarray((rows - row) ** 2 + (columns - column) ** 2 <= DISC_RADIUS**2)


def _wider(area: MaskArray) -> MaskArray:
    grown = Image.fromarray(area.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(_LASSO_SLACK))
    return np.asarray(grown) != 0
