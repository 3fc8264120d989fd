"""Requests to `dbsam_interactive`: an image by its id, sent only where the server lacks it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from ..core.contract import (
    ADAPT_POINTS,
    ANY_IOU_SCORES,
    ANY_MASKS,
    BOXES,
    CACHED,
    HAS_MASK_INPUT,
    IMAGE_ID,
    LOW_RES_LOGITS,
    MASK_INPUT,
    MASKS_PACKED,
    MULTIMASK,
    NUM_MASK_TOKENS,
    POINT_COORDS,
    RAW_IMAGE,
    TensorSpec,
    any_logits,
    interactive_spec,
)
from ..core.errors import ServingError
from ..core.image_id import image_id
from ..core.imaging import Arrays, ByteArray, check_boxes, check_contrast, check_image
from ..core.masks import Prediction, unpack_masks
from ..core.prompts import DecoderPrompts, PromptArrays, check_mask_pixels
from .calls import Call, prompt_arrays

_MODEL = interactive_spec(1)
KNOWN_MODEL = _MODEL.name
_EARLIER_MASK = (MASK_INPUT, HAS_MASK_INPUT)
_AFFINITY_DIGITS = 8
"""Of an image's id, for balancers: they tell servers apart by it, and nobody an image."""

_Outputs = dict[TensorSpec, tuple[int, ...]]
"""Outputs to ask for → their shapes."""


class KnownPrompts(DecoderPrompts, total=False):
    """All that may be asked of an image that a server keeps.

    Attributes:
        logits: return the logits too, to prompt again with (by default False).
    """

    logits: bool


@dataclass(eq=False)
class KnownImage:
    """An image and what its server calls it.

    Attributes:
        pixels: (H, W, 3) uint8 RGB; kept to be sent again where the server dropped it.
        id: `core.image_id.image_id` of it.
        cached: whether the last answer needed no encoder; None before the first.
    """

    pixels: ByteArray
    id: str
    cached: bool | None = None

    @classmethod
    def of(cls, image: npt.NDArray[Any]) -> KnownImage:
        """The image, checked.

        Raises:
            InputError: see `imaging.check_image` and `check_contrast`.
        """
        pixels = np.ascontiguousarray(check_contrast(check_image(np.asarray(image))))
        return cls(pixels, image_id(pixels))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]


@dataclass(frozen=True)
class Wanted:
    """What a request wants of its masks.

    Attributes:
        side: 4G, the side of the server's mask grid.
        logits: the low-resolution logits, too.
        packed: masks as compressed bits instead of bytes.
    """

    side: int
    logits: bool
    packed: bool

    def outputs(self, count: int, masks: int, size: tuple[int, int]) -> _Outputs:
        """Outputs and their shapes, for `count` prompts of `masks` masks each."""
        pixels: _Outputs = {ANY_MASKS: (count, masks, *size)}
        found: _Outputs = {MASKS_PACKED: (1,)} if self.packed else pixels
        found |= {ANY_IOU_SCORES: (count, masks), CACHED: (1,)}
        if self.logits:
            found[any_logits(self.side)] = (count, masks, self.side, self.side)
        return found


def has_earlier_mask(*, mask_input: npt.NDArray[Any] | None = None, **_: Any) -> bool:
    """Whether prompts continue from the logits of an earlier answer."""
    return mask_input is not None


def open_call(image: KnownImage) -> Call:
    """A request that only has the image encoded."""
    return _call(image, {}, {IMAGE_ID: (1,), CACHED: (1,)})


def known_boxes_call(image: KnownImage, boxes: npt.NDArray[Any], wanted: Wanted) -> Call:
    """A request for one mask per box, see `calls.box_call`."""
    checked = check_boxes(np.asarray(boxes), image.size)
    check_mask_pixels(len(checked), image.size)
    return _call(image, {BOXES: checked}, wanted.outputs(len(checked), 1, image.size))


def known_prompts_call(
    image: KnownImage,
    wanted: Wanted,
    *,
    multimask: bool = False,
    adapt_points: bool = True,
    **prompts: Unpack[PromptArrays],
) -> Call:
    """A request for mask token 0 of each prompt set, or for tokens 1–3 with `multimask`."""
    arrays = prompt_arrays(image.size, wanted.side, **prompts)
    count = len(arrays[POINT_COORDS])
    if not has_earlier_mask(**prompts):  # no zeros on the way
        arrays = {name: array for name, array in arrays.items() if name not in _EARLIER_MASK}
    arrays[MULTIMASK.name] = np.array([multimask], np.uint8)
    if not adapt_points:
        arrays[ADAPT_POINTS.name] = np.zeros(1, np.uint8)
    masks = NUM_MASK_TOKENS - 1 if multimask else 1
    check_mask_pixels(count * masks, image.size)
    return _call(image, arrays, wanted.outputs(count, masks, image.size))


def _call(image: KnownImage, prompts: Arrays, outputs: _Outputs) -> Call:
    spec = replace(_MODEL, inputs=(), outputs=tuple(outputs))
    arrays: Arrays = {IMAGE_ID.name: np.array([image.id.encode()], object), **prompts}
    shapes = {spec.name: shape for spec, shape in outputs.items()}
    return Call(spec, arrays, shapes, image.id[:_AFFINITY_DIGITS])


def with_pixels(call: Call, image: KnownImage) -> Call:
    """The same request with the image itself, for a server that does not keep it."""
    arrays = {name: array for name, array in call.arrays.items() if name != IMAGE_ID.name}
    return replace(call, arrays={RAW_IMAGE.name: image.pixels, **arrays})


def check_opened(arrays: Arrays, image: KnownImage) -> None:
    """Refuse a server that calls the image otherwise.

    Raises:
        ServingError: it does.
    """
    answered = bytes(arrays[IMAGE_ID.name][0]).decode("ascii", "replace")
    if answered != image.id:
        raise ServingError(
            f"the server calls an image {answered[:80]} that is {image.id} here: is its "
            "repository of this library's version?"
        )


def known_result(arrays: Arrays, image: KnownImage) -> Prediction:
    """The masks of an answer.

    Args:
        arrays: the answer.
        image: where it is noted whether the encoder ran.

    Raises:
        ServingError: packed masks that are damaged.
    """
    image.cached = bool(arrays[CACHED.name][0])
    ious = arrays[ANY_IOU_SCORES.name]
    if ANY_MASKS.name in arrays:
        masks = arrays[ANY_MASKS.name]
    else:
        masks = _unpacked(arrays, (*ious.shape, *image.size))
    return Prediction(masks, ious, arrays.get(LOW_RES_LOGITS))


def _unpacked(arrays: Arrays, shape: tuple[int, ...]) -> ByteArray:
    try:
        return unpack_masks(bytes(arrays[MASKS_PACKED.name][0]), shape)
    except ValueError as error:
        raise ServingError(f"the server's answer: {error}") from error
