"""The prompt adapter: points for weights that were trained with boxes, by boxes that are tried.

A prompt set that the weights do not understand is replaced by boxes. Each is decoded, and the mask
of which the decoder is surest is taken from those that obey the points. Masks are looked at as
logits, and only at the pixels of the points: memory does not grow with the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .contract import BOXES, MAX_PROMPTS, NUM_MASK_TOKENS, decoder_spec, prompt_decoder_spec
from .imaging import Arrays, FloatArray, Preprocessing, logit_at, postprocess, to_model_frame
from .masks import mask_box
from .point_search import (
    MOST_BOXES,
    Boxes,
    boxes_around,
    boxes_beside,
    boxes_past,
    order_of,
    overlap,
)
from .points import PointRules
from .prompts import TOP_LEFT, join_prompts, set_feed

AT_ONCE = 8
"""Prompts that a decoder gets at once on a CPU, unless a server is told otherwise: the memory it
takes is bounded, and no bit of an answer depends on where it was computed."""
MAX_SEARCHES = MAX_PROMPTS // MOST_BOXES
"""Prompt sets of which a server searches each in one request: no more is decoded than for boxes."""
ALTERNATIVES = NUM_MASK_TOKENS - 1
_SAME = 0.8
"""IoU from which two answers are no alternatives."""

Decode = Callable[[str, Arrays], tuple[FloatArray, FloatArray]]
"""A graph's name and prompts (n, …) in the model frame → logits (n, M, 4G, 4G), IoU (n, M)."""


@dataclass(frozen=True, eq=False)
class Search:
    """What is tried in place of one prompt set, all in the image frame.

    Attributes:
        boxes: (K, 4) alone.
        pointed: (4,) a box that the set's points outside the object go with, or None.
        inside: (P, 2) x, y of points that the object has.
        outside: (Q, 2) of those that it has not.
        before: (4G, 4G) logits of the mask that is corrected, or None. None with a first of
            `boxes` that is such a mask's, see `is_first_before`.
        is_first_before: the mask of the first box is what is corrected; it is no answer itself
            unless it obeys all points.
    """

    boxes: Boxes
    inside: FloatArray
    outside: FloatArray
    pointed: npt.NDArray[np.float64] | None = None
    before: FloatArray | None = None
    is_first_before: bool = False

    @property
    def count(self) -> int:
        """Prompts that are decoded for it."""
        return len(self.boxes) + (self.pointed is not None)


def plan_search(
    coords: FloatArray,
    labels: npt.NDArray[np.int32],
    earlier: FloatArray | None,
    size: tuple[int, int],
    how: Preprocessing,
    rules: PointRules,
) -> Search | None:
    """What to try in place of a prompt set, or None for the decoder's own answer.

    Args:
        coords: (T, 2) tokens as `prompts.join_prompts` makes them, in the image frame.
        labels: (T,) of them.
        earlier: (4G, 4G) logits of an earlier mask, or None.
        size: height and width of the image.
        how: mode and sizes of the model.
        rules: of its weights.
    """
    inside, outside = coords[labels == 1], coords[labels == 0]
    corners = coords[labels >= TOP_LEFT]
    if len(corners):
        return _in_or_past(corners.reshape(4).astype(np.float64), inside, outside, size, rules)
    if rules.first != "search":
        return None
    before = None if earlier is None else postprocess(earlier, size, how)
    if before is None or not before.any():
        if not len(inside):
            return None
        return Search(boxes_around(_around(inside, size), size), inside, outside)
    box = mask_box(before)
    if len(inside):
        both = _joined(box, _around(inside, size))
        return Search(boxes_past(both, box, size), inside, outside, before=earlier)
    cuts = boxes_beside(box, _around(outside[-1:], size), size)
    tried = cuts[1:] if rules.in_box == "search" else cuts[:0]
    return Search(tried, inside, outside, pointed=box, before=earlier)


def _in_or_past(
    box: npt.NDArray[np.float64],
    inside: FloatArray,
    outside: FloatArray,
    size: tuple[int, int],
    rules: PointRules,
) -> Search | None:
    is_past = ((inside < box[:2]) | (inside > box[2:])).any()
    if is_past and rules.past_box == "search":
        both = _joined(box, _around(inside, size))
        tried = np.concatenate([box[None], boxes_past(both, box, size)])
        return Search(tried, inside, outside, is_first_before=True)
    if not is_past and len(outside) and rules.in_box == "search":
        cuts = boxes_beside(box, _around(outside[-1:], size), size)
        return Search(cuts, inside, outside, pointed=box, is_first_before=True)
    return None


def _around(points: FloatArray, size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """(4,) around the pixels of points (P, 2)."""
    pixels = _pixels(points, size).astype(np.float64)
    return np.concatenate([pixels.min(0), pixels.max(0) + 1])


def _pixels(points: FloatArray, size: tuple[int, int]) -> npt.NDArray[np.intp]:
    """Column and row of each point; one on the border is of the last pixel."""
    last = np.array([size[1] - 1, size[0] - 1])
    return np.minimum(np.floor(points).astype(np.intp), last)


def _joined(
    one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    return np.concatenate([np.minimum(one, other)[:2], np.maximum(one, other)[2:]])


class PromptAdapter:
    """Answers searches with one model's decoders.

    Args:
        how: mode and sizes of the model.
        size: height and width of the image.
        decode: asks a decoder about the image.
        at_once: prompts that it gets in one call.
    """

    def __init__(
        self, how: Preprocessing, size: tuple[int, int], decode: Decode, at_once: int = AT_ONCE
    ) -> None:
        self._how, self._size, self._decode, self._at_once = how, size, decode, at_once

    def answer(self, search: Search, tokens: slice) -> tuple[FloatArray, FloatArray] | None:
        """Logits (M, 4G, 4G) and IoU (M,) of a set, or None where no mask obeys at all.

        Args:
            search: what is tried.
            tokens: of SAM's four mask tokens those that are wanted: the first is the surest mask,
                the others are alternatives, of which it is the first; where there are fewer that
                obey, the last is repeated.
        """
        parts = list(self._decoded(search))
        low, iou = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        before = search.before
        if search.is_first_before:
            before = low[0]
            if not self._obeys(before, search):
                low, iou = low[1:], iou[1:]
        masks, score = low > 0, iou.astype(float)
        hits = (
            self._held(low, search.inside) if len(search.inside) else masks.any((1, 2)).astype(int)
        )
        if before is not None:
            score += overlap(masks, before > 0)
        order = order_of(hits, self._held(low, search.outside), score)
        if not order:
            return None
        chosen = [order[0], *_apart(masks, order)][tokens]
        return low[chosen], iou[chosen]

    def _decoded(self, search: Search) -> Iterator[tuple[FloatArray, FloatArray]]:
        """Logits (n, 4G, 4G) and IoU (n,) of the boxes, then of the one with points."""
        boxes = to_model_frame(np.asarray(search.boxes, np.float32), self._size, self._how)
        for start in range(0, len(boxes), self._at_once):
            low, iou = self._decode(
                decoder_spec(self._how).name, {BOXES: boxes[start : start + self._at_once]}
            )
            yield low[:, 0], iou[:, 0]
        if search.pointed is not None:
            marks = np.zeros((1, len(search.outside)), np.int32)
            coords, labels = join_prompts(
                self._size,
                boxes=search.pointed[None],
                point_coords=search.outside[None],
                point_labels=marks,
            )
            feed = set_feed(coords, labels, None, None, self._size, self._how)
            low, iou = self._decode(prompt_decoder_spec(self._how).name, feed)
            yield low[:, 0], iou[:, 0]

    def _obeys(self, low: FloatArray, search: Search) -> bool:
        """Whether a mask has all points that are inside, and none of those outside."""
        has, lacks = (
            int(self._held(low[None], points)[0]) for points in (search.inside, search.outside)
        )
        return has == len(search.inside) and lacks == 0

    def _held(self, low: FloatArray, points: FloatArray) -> npt.NDArray[np.intp]:
        """(n,) how many of the points (P, 2) each full-size mask has, exactly."""
        pixels = _pixels(points, self._size)
        return np.array(
            [
                sum(logit_at(one, self._size, self._how, row, column) > 0 for column, row in pixels)
                for one in low
            ],
            np.intp,
        )


def _apart(masks: npt.NDArray[np.bool_], order: list[int]) -> list[int]:
    """`ALTERNATIVES` of the masks in their order that differ, the last repeated where need be."""
    found: list[int] = []
    for index in order:
        if len(found) < ALTERNATIVES and (
            not found or overlap(masks[found], masks[index]).max() < _SAME
        ):
            found.append(index)
    return found + [found[-1]] * (ALTERNATIVES - len(found))
