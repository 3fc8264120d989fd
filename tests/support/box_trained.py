"""A stand-in for weights that were trained with boxes, whose answers are known exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dbsam_deploy.core.imaging import Arrays, FloatArray, Preprocessing

HOW = Preprocessing(64, "lite_medsam", embedding_stride=4)
SIZE = (64, 64)
"""Of the image, the model frame and the mask grid: a logit is a pixel."""


class BoxTrainedDecoder:
    """Decoders of a world of bright pieces: what is bright in a box, nothing for a point.

    The estimate is the part of the touched pieces that the mask has; points outside the object
    take a disc away.
    """

    def __init__(self, bright: npt.NDArray[np.bool_]) -> None:
        self.bright = bright
        self.asked: list[tuple[str, int]] = []
        self.pieces, _ = ndimage.label(bright)

    def __call__(self, graph: str, feed: Arrays) -> tuple[FloatArray, FloatArray]:
        """See `prompt_adapter.Decode`."""
        count = len(next(iter(feed.values())))
        self.asked.append((graph, count))
        low = np.full((count, 1 if graph == "decoder" else 4, *SIZE), -1, np.float32)
        iou = np.zeros(low.shape[:2], np.float32)
        for index in range(count):
            box, outside = self._box(graph, feed, index)
            if box is None:
                continue
            x0, y0, x1, y1 = np.round(box).astype(int)
            mask = np.zeros(SIZE, bool)
            mask[y0:y1, x0:x1] = self.bright[y0:y1, x0:x1]
            touched = np.isin(self.pieces, np.unique(self.pieces[mask])) & self.bright
            rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
            for x, y in outside:
                mask &= (rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 >= 9
            low[index][:, mask] = 1
            iou[index] = mask.sum() / max(1, touched.sum())
        return low, iou

    def _box(self, graph: str, feed: Arrays, index: int) -> tuple[Any, Any]:
        if graph == "decoder":
            return feed["boxes"][index], []
        coords, labels = feed["point_coords"][index], feed["point_labels"][index]
        box = coords[labels >= 2].reshape(-1) if (labels >= 2).any() else None
        return box, coords[labels == 0]


def blocks(*sides: tuple[int, int, int, int]) -> npt.NDArray[np.bool_]:
    """Bright rectangles, x0, y0, x1, y1."""
    bright = np.zeros(SIZE, bool)
    for x0, y0, x1, y1 in sides:
        bright[y0:y1, x0:x1] = True
    return bright


def picture(bright: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """(64, 64, 3) of a world of bright pieces."""
    return np.repeat(np.where(bright, 200, 20).astype(np.uint8)[..., None], 3, axis=2)


class BoxTrainedSession:
    """The same as a session, for 64 x 64 images; `understands_points` of a box's middle.

    Attributes:
        asked: each graph that ran, and on how many prompts.
    """

    backend = "stand-in"

    def __init__(self, *, understands_points: bool = False) -> None:
        self.asked: list[tuple[str, int]] = []
        self._understands = understands_points

    def run(self, graph: str, feed: Arrays) -> Arrays:
        """See `Session`."""
        if graph == "encoder":
            embedding = np.zeros((1, 256, HOW.grid, HOW.grid), np.float32)
            embedding.reshape(-1)[: SIZE[0] * SIZE[1]] = feed["image"][0, 0].reshape(-1) > 0.5
            return {"image_embeddings": embedding}
        bright = feed["image_embeddings"].reshape(-1)[: SIZE[0] * SIZE[1]].reshape(SIZE) > 0.5
        decoder = BoxTrainedDecoder(bright)
        low, iou = decoder(graph, {n: a[0] for n, a in feed.items() if n != "image_embeddings"})
        self.asked += decoder.asked
        if graph == "prompt_decoder" and self._understands:
            for one, places, marks in zip(
                low, feed["point_coords"][0], feed["point_labels"][0], strict=True
            ):
                for x, y in np.floor(places[marks == 1]).astype(int):
                    piece = decoder.pieces == decoder.pieces[y, x]
                    one[:, piece & bright] = 1
        return {"low_res_masks": low[None], "iou_predictions": iou[None]}
