"""A stand-in for a model that finds what is bright in a box, or around a point."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dbsam_deploy.core.masks import Prediction


class BrightPredictor:
    """A `Promptable` whose masks are exact: pixels of 128 and more.

    Attributes:
        encoded: how often an image was set.
        failing_at: the count of images at which `error` is raised; None for never.
    """

    def __init__(self, failing_at: int | None = None, error: BaseException | None = None) -> None:
        self.encoded, self.failing_at, self.error = 0, failing_at, error
        self._bright: npt.NDArray[np.bool_] = np.zeros((0, 0), bool)

    def set_image(self, image: npt.NDArray[Any]) -> None:
        """Take an image."""
        self.encoded += 1
        if self.encoded == self.failing_at and self.error is not None:
            raise self.error
        self._bright = image[..., 0] >= 128

    def predict_boxes(self, boxes: npt.NDArray[Any]) -> Prediction:
        """What is bright in each box."""
        masks = np.zeros((len(boxes), 1, *self._bright.shape), np.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks[:, 0], np.round(boxes).astype(int), strict=True):
            mask[y0:y1, x0:x1] = self._bright[y0:y1, x0:x1]
        return self._prediction(masks)

    def predict_prompts(self, *, multimask: bool = False, **prompts: Any) -> Prediction:
        """What is bright and holds the first point inside; without points, as `predict_boxes`."""
        coords, labels = prompts.get("point_coords"), prompts.get("point_labels")
        if coords is None:
            return self.predict_boxes(prompts["boxes"])
        pieces, _ = ndimage.label(self._bright)
        masks = np.zeros((len(coords), 1, *self._bright.shape), np.uint8)
        for mask, points, marks in zip(masks[:, 0], coords, labels, strict=True):
            x, y = np.floor(points[marks == 1][0]).astype(int)
            mask[:] = (pieces == pieces[y, x]) & self._bright
        return self._prediction(masks)

    def _prediction(self, masks: npt.NDArray[np.uint8]) -> Prediction:
        logits = np.zeros((*masks.shape[:2], 256, 256), np.float32)
        return Prediction(masks, np.full(masks.shape[:2], 0.9, np.float32), logits)


class FreeEncoder(BrightPredictor):
    """Embeddings of SAM's size at no cost; they hold what is bright."""

    def encode(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """See `Encoding`."""
        self.encoded += 1
        out = np.zeros((1, 256, 64, 64), np.float32)
        out.reshape(-1)[: image[..., 0].size] = (image[..., 0] >= 128).reshape(-1)
        return out

    def set_embeddings(
        self, image_embeddings: npt.NDArray[Any], original_size: tuple[int, int]
    ) -> None:
        """See `Encoding`."""
        pixels = original_size[0] * original_size[1]
        self._bright = image_embeddings.reshape(-1)[:pixels].reshape(original_size) > 0.5
