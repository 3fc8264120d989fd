"""Anything that turns an image and boxes into masks, as one callable."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..clients.calls import Segmentation
from ..core.contract import IMAGE, IMAGE_EMBEDDINGS
from ..core.errors import InputError
from ..core.imaging import ByteArray, FloatArray, check_boxes, preprocess
from ..prediction.predictor import Prediction, Predictor
from ..prediction.segment import prompts_at_once

BoxSegmenter = Callable[[ByteArray, FloatArray], Prediction]
"""(H, W, 3) uint8 RGB and (N, 4) float32 boxes in the image frame → `Prediction` of N masks.

`low_res_masks` is read by the protocol `medsam` only; elsewhere it may be empty.
"""

CACHED_EMBEDDINGS = 64


class Client(Protocol):
    """What is needed of `client.DbsamClient`."""

    def segment(self, image: npt.NDArray[Any], boxes: npt.NDArray[Any]) -> Segmentation:
        """See `DbsamClient.segment`."""
        ...

    def segment_prompts(self, image: npt.NDArray[Any], *, boxes: npt.NDArray[Any]) -> Segmentation:
        """See `DbsamClient.segment_prompts`."""
        ...


class PredictorSegmenter:
    """A `Predictor` as a `BoxSegmenter`; each image is encoded once, however often it comes back.

    Args:
        predictor: model and preprocessing.
        capacity: embeddings kept, the least recently used first to go.
    """

    def __init__(self, predictor: Predictor, capacity: int = CACHED_EMBEDDINGS) -> None:
        self._predictor = predictor
        self._capacity = capacity
        self._embeddings: OrderedDict[tuple[Any, ...], FloatArray] = OrderedDict()

    def __call__(self, image: ByteArray, boxes: FloatArray) -> Prediction:
        """See `BoxSegmenter`."""
        key = (image.shape, hashlib.blake2b(image.tobytes()).digest())
        if key in self._embeddings:
            self._embeddings.move_to_end(key)
        else:
            self._embeddings[key] = self._encode(image)
            if len(self._embeddings) > self._capacity:
                self._embeddings.popitem(last=False)
        self._predictor.set_embeddings(self._embeddings[key], (image.shape[0], image.shape[1]))
        return self._predictor.predict_boxes(boxes)

    def _encode(self, image: ByteArray) -> FloatArray:
        feed = {IMAGE: preprocess(image, self._predictor.preprocessing)}
        return self._predictor.session.run("encoder", feed)[IMAGE_EMBEDDINGS]


def as_segmenter(model: Predictor | BoxSegmenter) -> BoxSegmenter:
    """A predictor or a callable as a callable."""
    return PredictorSegmenter(model) if isinstance(model, Predictor) else model


def remote_segmenter(client: Client, *, logits: bool) -> BoxSegmenter:
    """A Triton server as a `BoxSegmenter`.

    Args:
        client: connected; the server encodes the image anew for each call.
        logits: ask for low-resolution logits too, which only the ensemble for prompts returns.
    """

    def boxes_only(image: ByteArray, boxes: FloatArray) -> Prediction:
        answer = client.segment(image, boxes)
        none = np.empty((len(boxes), 1, 0, 0), np.float32)
        return Prediction(answer.masks[:, None], answer.iou_scores[:, None], none)

    def with_logits(image: ByteArray, boxes: FloatArray) -> Prediction:
        answer = client.segment_prompts(image, boxes=boxes)
        if answer.low_res_logits is None:
            raise InputError("the server answered without low-resolution logits")
        return Prediction(answer.masks, answer.iou_scores, answer.low_res_logits)

    return with_logits if logits else boxes_only


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
    return Prediction(
        masks,
        np.concatenate([part.iou_predictions for part in parts]),
        np.concatenate([part.low_res_masks for part in parts]),
    )
