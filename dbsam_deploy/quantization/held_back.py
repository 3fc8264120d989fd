"""Held-back images as a sweep sees them: input, the float model's embedding, and its masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.contract import IMAGE, IMAGE_EMBEDDINGS
from ..core.imaging import ByteArray, FloatArray, Preprocessing, preprocess
from ..prediction.predictor import Predictor
from ..recipe import Parity
from ..sessions.session import Session
from ..verification.cases import Case, read_case
from ..verification.parity import dice
from .calibration_images import CalibrationImage, read_images

BOX_SHARES = (
    (0.25, 0.25, 0.75, 0.75),
    (0.1, 0.1, 0.5, 0.5),
    (0.5, 0.1, 0.9, 0.5),
    (0.1, 0.5, 0.5, 0.9),
    (0.5, 0.5, 0.9, 0.9),
)
"""Boxes for an image without labels: the middle and the quarters, in parts of width and height."""


@dataclass(frozen=True)
class View:
    """One held-back image.

    Attributes:
        name: file and slice.
        sha256: of its pixels.
        image: (1, 3, S, S) float32, the encoder's input.
        embedding: (1, C, G, G) float32, the float model's.
        boxes: (N, 4) float32 in the image frame.
        masks: (N, H, W) uint8, the float model's.
        truth: (N, H, W) bool; None for an image without labels.
        how: the preprocessing.
        session: the float model, for its decoder.
    """

    name: str
    sha256: str
    image: FloatArray
    embedding: FloatArray
    boxes: FloatArray
    masks: npt.NDArray[Any]
    truth: npt.NDArray[np.bool_] | None
    how: Preprocessing
    session: Session

    def judge(self, embedding: FloatArray) -> tuple[list[float], list[float]]:
        """What the float decoder makes of another embedding.

        Returns:
            Dice of each mask with the float model's, and how much lower its Dice with the truth is
            than the float model's; the second is empty for an image without labels.
        """
        masks = _masks(self.session, self.how, embedding, self.boxes, self.masks.shape[1:])
        drops = []
        if self.truth is not None:
            for mask, own, truth in zip(masks, self.masks, self.truth, strict=True):
                drops.append(dice(own, truth) - dice(mask, truth))
        return list(map(dice, masks, self.masks)), drops


def make_views(
    folder: Path,
    images: tuple[CalibrationImage, ...],
    session: Session,
    how: Preprocessing,
    parity: Parity,
) -> Iterator[View]:
    """Run the float model on images, one at a time.

    Boxes are those of the objects where an npz has labels, else `BOX_SHARES`.

    Args:
        folder: of the set.
        images: the held-back ones.
        session: the float model.
        how: its preprocessing.
        parity: how many boxes an image has, and their jitter.

    Raises:
        InputError: a file that changed or is damaged.
    """
    for image, pixels in read_images(folder, images):
        feed: FloatArray = preprocess(pixels, how)
        embedding = session.run("encoder", {IMAGE: feed})[IMAGE_EMBEDDINGS]
        case = _case(folder / image.file, image.slice, pixels, parity)
        boxes = _default_boxes(pixels) if case is None else case.boxes
        truth = None if case is None else case.truth
        masks = _masks(session, how, embedding, boxes, pixels.shape[:2])
        name = f"{image.file}[{image.slice}]"
        yield View(name, image.sha256, feed, embedding, boxes, masks, truth, how, session)


def _case(path: Path, index: int, pixels: ByteArray, parity: Parity) -> Case | None:
    return read_case(path, index, pixels, parity) if path.suffix == ".npz" else None


def _default_boxes(pixels: ByteArray) -> FloatArray:
    height, width = pixels.shape[:2]
    return np.array(BOX_SHARES, np.float32) * np.array([width, height] * 2, np.float32)


def _masks(
    session: Session,
    how: Preprocessing,
    embedding: FloatArray,
    boxes: FloatArray,
    size: tuple[int, ...],
) -> npt.NDArray[Any]:
    predictor = Predictor(session, how)
    predictor.set_embeddings(embedding, (size[0], size[1]))
    return predictor.predict_boxes(boxes).masks[:, 0]
