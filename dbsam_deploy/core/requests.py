"""Prompts of one request, in the image frame → what the decoders take, in the model frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .contract import (
    ADAPT_POINTS,
    BOXES,
    HAS_MASK_INPUT,
    MASK_INPUT,
    MAX_PROMPTS,
    MULTIMASK,
    NUM_MASK_TOKENS,
    POINT_COORDS,
    POINT_LABELS,
    TensorSpec,
    decoder_spec,
    prompt_decoder_spec,
)
from .errors import InputError
from .imaging import Arrays, FloatArray, Preprocessing, check_boxes, to_model_frame
from .points import NATIVE, PointRules
from .prompt_adapter import Decode, PromptAdapter, Search, plan_search
from .prompts import IntArray, check_mask_input, check_mask_pixels, check_tokens, set_feed

_POINTS, _MASKS = (POINT_COORDS, POINT_LABELS), (MASK_INPUT, HAS_MASK_INPUT)


@dataclass(frozen=True)
class ReadPrompts:
    """N prompts of one image.

    Attributes:
        graph: the exported graph that takes them.
        feed: the graph's inputs apart from the embedding, without their batch axis: (N, …).
        count: N.
        tokens: those of the graph's masks that are wanted of each.
        searches: index of a prompt set → what is tried in its place.
    """

    graph: str
    feed: Arrays
    count: int
    tokens: slice
    searches: Mapping[int, Search] = field(default_factory=dict)

    @property
    def masks(self) -> int:
        """How many masks each prompt gets."""
        return int(self.tokens.stop - self.tokens.start)

    @property
    def work(self) -> int:
        """Prompts that are decoded for them."""
        tried = (search.count for search in self.searches.values())
        return self.count - len(self.searches) + sum(tried)

    def decoded(
        self, part: range, decode: Decode, adapter: PromptAdapter
    ) -> tuple[FloatArray, FloatArray]:
        """Logits (n, M, 4G, 4G) and IoU (n, M) of some of the prompts, by their index.

        Args:
            part: those prompts.
            decode: asks a decoder about the image.
            adapter: answers searches with it.
        """
        found = {
            index: answer
            for index in part
            if index in self.searches
            and (answer := adapter.answer(self.searches[index], self.tokens)) is not None
        }
        rest = [index for index in part if index not in found]
        if rest:
            chosen = slice(part.start, part.stop) if len(rest) == len(part) else rest
            low, iou = decode(
                self.graph, {name: array[chosen] for name, array in self.feed.items()}
            )
            own = zip(low[:, self.tokens], iou[:, self.tokens], strict=True)
            if not found:
                return low[:, self.tokens], iou[:, self.tokens]
            found.update(zip(rest, own, strict=True))
        low, iou = (np.stack([found[index][i] for index in part]) for i in (0, 1))
        return low, iou


def read_prompts(
    arrays: Arrays,
    original_size: tuple[int, int],
    how: Preprocessing,
    rules: PointRules = NATIVE,
) -> ReadPrompts | None:
    """Check the prompts of a request and take them to the model frame.

    Args:
        arrays: inputs of `contract.interactive_spec`; those that are not prompts are passed over.
            `mask_input` and `has_mask_input` may be left out together, and `multimask_tokens` and
            `adapt_points`.
        original_size: height and width of the image.
        how: mode and sizes.
        rules: of the model's weights.

    Returns:
        None where there are no prompts.

    Raises:
        InputError: boxes and prompt sets together, an incomplete set, one that is not usable, an
            answer that would be too large, or more to decode than `MAX_PROMPTS`.
    """
    names = (*_POINTS, *_MASKS, MULTIMASK.name, ADAPT_POINTS.name)
    given = [name for name in names if name in arrays]
    if BOXES not in arrays and not given:
        return None
    if BOXES in arrays:
        if given:
            raise InputError(f"boxes together with {given}: a box in a prompt set is two points")
        return _boxes(arrays, original_size, how)
    needed = [*_POINTS, *(_MASKS if set(_MASKS) & set(given) else ())]
    if missing := [name for name in needed if name not in arrays]:
        raise InputError(f"prompt sets without {missing}: expected all of {needed}")
    if not _flag(arrays, ADAPT_POINTS, default=True):
        rules = NATIVE
    return _prompt_sets(arrays, original_size, how, rules)


def _boxes(arrays: Arrays, size: tuple[int, int], how: Preprocessing) -> ReadPrompts:
    boxes = check_boxes(arrays[BOXES], size)
    check_mask_pixels(len(boxes), size)
    feed = {BOXES: to_model_frame(boxes, size, how)}
    return ReadPrompts(decoder_spec(how).name, feed, len(boxes), slice(0, 1))


def _prompt_sets(
    arrays: Arrays, size: tuple[int, int], how: Preprocessing, rules: PointRules
) -> ReadPrompts:
    coords, labels = check_tokens(arrays[POINT_COORDS], arrays[POINT_LABELS], size)
    count, tokens = len(coords), _tokens(arrays)
    check_mask_pixels(count * (tokens.stop - tokens.start), size)
    masks = has_mask = None
    if MASK_INPUT in arrays:
        masks = check_mask_input(arrays[MASK_INPUT], count, how.mask_side)
        has_mask = arrays[HAS_MASK_INPUT]
        if has_mask.shape != (count,) or not np.isin(has_mask, (0, 1)).all():
            raise InputError(f"has_mask_input {has_mask}: expected 0 or 1 for {count} prompts")
    found = planned_sets(coords, labels, masks, has_mask, size, how, tokens=tokens, rules=rules)
    if found.searches and found.work > MAX_PROMPTS:
        raise InputError(
            f"{count} prompt sets with points, for which {found.work} boxes are tried: at most "
            f"{MAX_PROMPTS} in one request; send fewer at a time, or {ADAPT_POINTS.name} 0"
        )
    return found


def planned_sets(
    coords: FloatArray,
    labels: IntArray,
    masks: FloatArray | None,
    has_mask: npt.NDArray[np.floating] | None,
    size: tuple[int, int],
    how: Preprocessing,
    *,
    tokens: slice,
    rules: PointRules,
) -> ReadPrompts:
    """Checked prompt sets, see `prompts.set_feed`, and what is tried in the place of some.

    Args:
        coords: see `set_feed`, as the following.
        labels: as `coords`.
        masks: as `coords`.
        has_mask: as `coords`.
        size: as `coords`.
        how: as `coords`.
        tokens: mask tokens that are wanted of each.
        rules: of the model's weights.
    """
    searches = {}
    if rules.searches:
        is_given = np.zeros(len(coords)) if has_mask is None else has_mask
        for index in range(len(coords)):
            earlier = masks[index] if masks is not None and is_given[index] else None
            search = plan_search(coords[index], labels[index], earlier, size, how, rules)
            if search is not None:
                searches[index] = search
    feed = set_feed(coords, labels, masks, has_mask, size, how)
    return ReadPrompts(prompt_decoder_spec(how).name, feed, len(coords), tokens, searches)


def _tokens(arrays: Arrays) -> slice:
    if MULTIMASK.name not in arrays:
        return slice(0, NUM_MASK_TOKENS)
    several = _flag(arrays, MULTIMASK, default=False)
    return slice(1, NUM_MASK_TOKENS) if several else slice(0, 1)


def _flag(arrays: Arrays, spec: TensorSpec, *, default: bool) -> bool:
    """An optional input of one number, 0 or 1."""
    value = arrays.get(spec.name)
    if value is None:
        return default
    if value.shape != (1,) or value[0] > 1:
        raise InputError(f"{spec.name} {value}: expected [0] or [1]")
    return bool(value[0])
