"""Anything that turns an image and boxes into masks, as one callable."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..core.errors import InputError
from ..core.imaging import ByteArray, FloatArray, check_boxes, is_constant
from ..core.masks import Prediction
from ..prediction.predictor import Promptable
from ..prediction.segment import prompts_at_once

BoxSegmenter = Callable[[ByteArray, FloatArray], Prediction]
"""(H, W, 3) uint8 RGB and (N, 4) float32 boxes in the image frame → `Prediction` of N masks.

`logits` are read by the protocol `medsam` only; elsewhere they may be None.
"""

KEPT_EMBEDDINGS = 64
"""Images that a `Predictor` should keep here: protocols come back to a slice with another box."""


def as_segmenter(model: Promptable | BoxSegmenter) -> BoxSegmenter:
    """A predictor or a callable as a callable.

    An image of one colour, as an empty slice of a volume is, gets empty masks from a predictor.
    """
    if callable(model):
        return model

    def segment_image(image: ByteArray, boxes: FloatArray) -> Prediction:
        if is_constant(image.reshape(-1, 3)):
            masks = np.zeros((len(boxes), 1, *image.shape[:2]), np.uint8)
            return Prediction(masks, np.zeros((len(boxes), 1), np.float32))
        model.set_image(image)
        return model.predict_boxes(boxes)

    return segment_image


def segment_boxes(segmenter: BoxSegmenter, image: ByteArray, boxes: FloatArray) -> Prediction:
    """Ask for any number of boxes of one image, as many in one call as memory allows.

    Raises:
        InputError: a box outside the image, or masks of another number or size than asked for.
    """
    size = (image.shape[0], image.shape[1])
    step = prompts_at_once(size)
    chunks = [boxes[i : i + step] for i in range(0, len(boxes), step)]
    parts = [segmenter(image, check_boxes(chunk, size)) for chunk in chunks]
    masks = np.concatenate([part.masks for part in parts])
    if masks.shape != (len(boxes), 1, *size):
        raise InputError(
            f"the segmenter returned masks of shape {masks.shape} for {len(boxes)} boxes on an "
            f"image of {size}; expected (N, 1, H, W)"
        )
    logits = [part.logits for part in parts if part.logits is not None]
    return Prediction(
        masks,
        np.concatenate([part.ious for part in parts]),
        np.concatenate(logits) if logits else None,
    )
