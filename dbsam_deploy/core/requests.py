"""Prompts of one request, in the image frame → what the decoders take, in the model frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .contract import (
    BOXES,
    HAS_MASK_INPUT,
    MASK_INPUT,
    MULTIMASK,
    NUM_MASK_TOKENS,
    POINT_COORDS,
    POINT_LABELS,
    decoder_spec,
    prompt_decoder_spec,
)
from .errors import InputError
from .imaging import Arrays, Preprocessing, check_boxes, to_model_frame
from .prompts import check_mask_input, check_mask_pixels, check_tokens

_POINTS, _MASKS = (POINT_COORDS, POINT_LABELS), (MASK_INPUT, HAS_MASK_INPUT)


@dataclass(frozen=True)
class ReadPrompts:
    """N prompts of one image.

    Attributes:
        graph: the exported graph that takes them.
        feed: the graph's inputs apart from the embedding, without their batch axis: (N, …).
        count: N.
        tokens: those of the graph's masks that are wanted of each.
    """

    graph: str
    feed: Arrays
    count: int
    tokens: slice

    @property
    def masks(self) -> int:
        """How many masks each prompt gets."""
        return int(self.tokens.stop - self.tokens.start)


def read_prompts(
    arrays: Arrays, original_size: tuple[int, int], how: Preprocessing
) -> ReadPrompts | None:
    """Check the prompts of a request and take them to the model frame.

    Args:
        arrays: inputs of `contract.interactive_spec`; those that are not prompts are passed over.
            `mask_input` and `has_mask_input` may be left out together, and `multimask_tokens`.
        original_size: height and width of the image.
        how: mode and sizes.

    Returns:
        None where there are no prompts.

    Raises:
        InputError: boxes and prompt sets together, an incomplete set, one that is not usable, or an
            answer that would be too large.
    """
    given = [name for name in (*_POINTS, *_MASKS, MULTIMASK.name) if name in arrays]
    if BOXES not in arrays and not given:
        return None
    if BOXES in arrays:
        if given:
            raise InputError(f"boxes together with {given}: a box in a prompt set is two points")
        return _boxes(arrays, original_size, how)
    needed = [*_POINTS, *(_MASKS if set(_MASKS) & set(given) else ())]
    if missing := [name for name in needed if name not in arrays]:
        raise InputError(f"prompt sets without {missing}: expected all of {needed}")
    return _prompt_sets(arrays, original_size, how)


def _boxes(arrays: Arrays, size: tuple[int, int], how: Preprocessing) -> ReadPrompts:
    boxes = check_boxes(arrays[BOXES], size)
    check_mask_pixels(len(boxes), size)
    feed = {BOXES: to_model_frame(boxes, size, how)}
    return ReadPrompts(decoder_spec(how).name, feed, len(boxes), slice(0, 1))


def _prompt_sets(arrays: Arrays, size: tuple[int, int], how: Preprocessing) -> ReadPrompts:
    coords, labels = check_tokens(arrays[POINT_COORDS], arrays[POINT_LABELS], size)
    count, side, tokens = len(coords), how.mask_side, _tokens(arrays)
    check_mask_pixels(count * (tokens.stop - tokens.start), size)
    if MASK_INPUT in arrays:
        masks, has_mask = check_mask_input(arrays[MASK_INPUT], count, side), arrays[HAS_MASK_INPUT]
    else:
        masks, has_mask = np.zeros((count, side, side), np.float32), np.zeros(count, np.float32)
    if has_mask.shape != (count,) or not np.isin(has_mask, (0, 1)).all():
        raise InputError(f"has_mask_input {has_mask}: expected 0 or 1 for {count} prompts")
    feed: Arrays = {
        # "Not a point" keeps zero coordinates, as in local prediction: zero maps to zero.
        POINT_COORDS: to_model_frame(coords, size, how),
        POINT_LABELS: labels,
        MASK_INPUT: masks[:, None],
        HAS_MASK_INPUT: np.asarray(has_mask, np.float32),
    }
    return ReadPrompts(prompt_decoder_spec(how).name, feed, count, tokens)


def _tokens(arrays: Arrays) -> slice:
    if MULTIMASK.name not in arrays:
        return slice(0, NUM_MASK_TOKENS)
    value = arrays[MULTIMASK.name]
    if value.shape != (1,) or value[0] > 1:
        raise InputError(f"multimask_tokens {value}: expected [0] or [1]")
    return slice(1, NUM_MASK_TOKENS) if value[0] else slice(0, 1)
