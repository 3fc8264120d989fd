"""Image and prompts in, masks out, on any `Session`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.contract import (
    BOXES,
    HAS_MASK_INPUT,
    IMAGE,
    IMAGE_EMBEDDINGS,
    IOU_PREDICTIONS,
    LOW_RES_MASKS,
    MASK_INPUT,
    NUM_MASK_TOKENS,
    POINT_COORDS,
    POINT_LABELS,
)
from ..core.errors import InputError
from ..core.imaging import (
    ByteArray,
    FloatArray,
    Preprocessing,
    check_boxes,
    check_image,
    postprocess,
    preprocess,
    to_model_frame,
)
from ..core.prompts import check_mask_input, join_prompts
from ..sessions.session import Session


@dataclass(frozen=True)
class Prediction:
    """Masks of N prompts of one image.

    Attributes:
        masks: (N, M, H, W) uint8 in the image frame, 1 inside; M is 1, or 3 with multimask.
        iou_predictions: (N, M) float32, the decoder's estimate.
        low_res_masks: (N, M, 4G, 4G) float32 logits on the mask grid.
    """

    masks: ByteArray
    iou_predictions: FloatArray
    low_res_masks: FloatArray


class Predictor:
    """Segments images with one session; the last image's embedding is kept for further prompts.

    Args:
        session: runtime with the graphs.
        preprocessing: how images enter the model; must match the graphs' image size.
    """

    def __init__(self, session: Session, preprocessing: Preprocessing) -> None:
        self.session = session
        self.preprocessing = preprocessing
        self._image_embeddings: FloatArray | None = None
        self._original_size = (0, 0)

    def set_embeddings(self, image_embeddings: FloatArray, original_size: tuple[int, int]) -> None:
        """Use an embedding computed before, (1, 256, G, G), of an image of `original_size`."""
        self._image_embeddings, self._original_size = image_embeddings, original_size

    def set_image(self, image: npt.NDArray[Any]) -> None:
        """Encode `image` ((H, W, 3) uint8 RGB) for the following `predict` calls."""
        image = check_image(image)
        pixels = preprocess(image, self.preprocessing)
        embeddings = self.session.run("encoder", {IMAGE: pixels})[IMAGE_EMBEDDINGS]
        self.set_embeddings(embeddings, (image.shape[0], image.shape[1]))

    def predict_boxes(self, boxes: npt.NDArray[Any]) -> Prediction:
        """One independent mask for each box.

        Args:
            boxes: (N, 4) x0, y0, x1, y1 in the image frame.

        Raises:
            InputError: no image was set, or see `check_boxes`.
        """
        embeddings = self._embeddings()
        values = check_boxes(boxes, self._original_size)
        model_boxes = to_model_frame(values, self._original_size, self.preprocessing)[None]
        out = self.session.run("decoder", {IMAGE_EMBEDDINGS: embeddings, BOXES: model_boxes})
        return self._prediction(out[LOW_RES_MASKS][0], out[IOU_PREDICTIONS][0])

    def predict_prompts(
        self,
        *,
        boxes: npt.NDArray[Any] | None = None,
        point_coords: npt.NDArray[Any] | None = None,
        point_labels: npt.NDArray[Any] | None = None,
        mask_input: npt.NDArray[Any] | None = None,
        multimask: bool = False,
    ) -> Prediction:
        """One prediction for each of N prompt sets: box, points and an earlier mask, combined.

        Args:
            boxes: (N, 4) in the image frame.
            point_coords: (N, P, 2) x, y in the image frame.
            point_labels: (N, P) 1 foreground, 0 background, -1 no point.
            mask_input: (N, 4G, 4G) float logits, as in `Prediction.low_res_masks`.
            multimask: return the three alternatives instead of the single mask.

        Raises:
            InputError: no image, neither boxes nor points, or arrays that do not fit together.
        """
        embeddings = self._embeddings()
        size, how = self._original_size, self.preprocessing
        tokens_xy, labels = join_prompts(
            size, boxes=boxes, point_coords=point_coords, point_labels=point_labels
        )
        coords = to_model_frame(tokens_xy, size, how)
        count, side = len(coords), how.mask_side
        masks = np.zeros((1, count, 1, side, side), np.float32)
        if mask_input is not None:
            masks[0, :, 0] = check_mask_input(mask_input, count, side)
        has_mask = np.full((1, count), mask_input is not None, np.float32)
        feed = {
            IMAGE_EMBEDDINGS: embeddings,
            POINT_COORDS: coords[None],
            POINT_LABELS: labels[None],
            MASK_INPUT: masks,
            HAS_MASK_INPUT: has_mask,
        }
        out = self.session.run("prompt_decoder", feed)
        tokens = slice(1, NUM_MASK_TOKENS) if multimask else slice(0, 1)
        return self._prediction(
            out[LOW_RES_MASKS][0, :, tokens], out[IOU_PREDICTIONS][0, :, tokens]
        )

    def _embeddings(self) -> FloatArray:
        if self._image_embeddings is None:
            raise InputError("no image: call set_image before asking for masks")
        return self._image_embeddings

    def _prediction(self, low_res_masks: FloatArray, iou_predictions: FloatArray) -> Prediction:
        masks = postprocess(low_res_masks, self._original_size, self.preprocessing)
        return Prediction(masks, iou_predictions, low_res_masks)
