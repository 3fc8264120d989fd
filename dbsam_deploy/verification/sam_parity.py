"""Files in SAM's signature against the export that they were made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..core.contract import (
    HAS_MASK_INPUT,
    IMAGE_EMBEDDINGS,
    IOU_PREDICTIONS,
    LOW_RES_MASKS,
    MASK_INPUT,
    POINT_COORDS,
    POINT_LABELS,
)
from ..core.errors import AccuracyError
from ..core.imaging import ByteArray, FloatArray
from ..core.sam_contract import SAM_IMAGE, SAM_MASKS, SAM_SIDE, SAM_SIZE
from ..prediction.predictor import Predictor
from ..sessions.onnxruntime_providers import CPU, import_onnxruntime, open_session
from .cases import Case
from .parity import cosine, dice

MIN_COSINE, MIN_AGREEMENT = 0.9999, 0.99
"""Of embeddings and logits, and of masks: the graphs are the same ones."""
BACKGROUND = (0, 0, 51)
"""Around a picture that is not square, where Cornerstone renders it for its model."""


@dataclass(frozen=True)
class SamFigures:
    """What was measured; the smallest of all pictures.

    Attributes:
        embedding_cosine: of the embeddings.
        decoder_cosine: of a box's logits on the same embedding, and of corrections of it.
        agreement: Dice of masks from the picture on with those of `predict`.
    """

    embedding_cosine: float
    decoder_cosine: float
    agreement: float


PICTURES_FILE = "encoder_hwc"
"""The encoder that takes a picture as it is, of models whose preprocessing keeps its aspect."""


class SamFiles:
    """`encoder.onnx` and `decoder.onnx` of a folder on ONNX Runtime's CPU provider."""

    def __init__(self, folder: Path) -> None:
        runtime = import_onnxruntime()
        self._encoder, self._decoder = (
            open_session(runtime, str(folder / f"{name}.onnx"), CPU)
            for name in ("encoder", "decoder")
        )
        path = folder / f"{PICTURES_FILE}.onnx"
        self._pictures = open_session(runtime, str(path), CPU) if path.is_file() else None

    def encode(self, canvas: ByteArray) -> FloatArray:
        """Embedding of a picture (1024, 1024, 3) uint8, as a browser hands it over."""
        pixels = canvas.astype(np.float32).transpose(2, 0, 1)[None] / np.float32(255)
        found: FloatArray = self._encoder.run(None, {SAM_IMAGE: pixels})[0]
        return found

    def encode_picture(self, picture: ByteArray) -> FloatArray | None:
        """Embedding of a picture (H, W, 3) uint8, longest side 1024; None without such a file."""
        if self._pictures is None:
            return None
        found: FloatArray = self._pictures.run(None, {SAM_IMAGE: picture.astype(np.float32)})[0]
        return found

    def decode(
        self,
        embedding: FloatArray,
        points: npt.NDArray[Any],
        labels: npt.NDArray[Any],
        size: tuple[int, int] = (SAM_SIDE, SAM_SIDE),
        earlier: FloatArray | None = None,
    ) -> dict[str, FloatArray]:
        """Mask, estimate and logits of one set of prompts, by their names in the signature.

        Args:
            embedding: of a picture.
            points: (P, 2) x, y in the frame of 1024.
            labels: (P,).
            size: height and width of the user's image.
            earlier: (1, 1, 4G, 4G) logits.
        """
        shape = self._decoder.get_inputs()[3].shape
        feed = {
            IMAGE_EMBEDDINGS: embedding,
            POINT_COORDS: np.asarray(points, np.float32)[None],
            POINT_LABELS: np.asarray(labels, np.float32)[None],
            MASK_INPUT: np.zeros(shape, np.float32) if earlier is None else earlier,
            HAS_MASK_INPUT: np.array([earlier is not None], np.float32),
            SAM_SIZE: np.array(size, np.float32),
        }
        names = [SAM_MASKS, IOU_PREDICTIONS, LOW_RES_MASKS]
        return dict(zip(names, self._decoder.run(names, feed), strict=True))


def canvas_of(image: ByteArray) -> tuple[ByteArray, float, tuple[int, int]]:
    """A picture as Cornerstone renders it for its model: as large as 1024×1024 allows, centred.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        (1024, 1024, 3) uint8; its pixels for one of the image; x and y of the image's corner.
    """
    height, width = image.shape[:2]
    scale = SAM_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    corner = (SAM_SIDE - size[0]) // 2, (SAM_SIDE - size[1]) // 2
    canvas = Image.new("RGB", (SAM_SIDE, SAM_SIDE), BACKGROUND)
    canvas.paste(Image.fromarray(image).resize(size, Image.Resampling.NEAREST), corner)
    return np.asarray(canvas), scale, corner


def _resized(image: ByteArray) -> ByteArray:
    """A picture with a longest side of 1024, as SAM's runners resize it."""
    scale = SAM_SIDE / max(image.shape[:2])
    width, height = (max(1, int(side * scale + 0.5)) for side in image.shape[1::-1])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def compare_sam_files(files: SamFiles, predictor: Predictor, cases: list[Case]) -> SamFigures:
    """Ask both for real pictures, with a box, and with clicks and logits that correct it.

    Args:
        files: what is to be published.
        predictor: the export.
        cases: pictures with boxes.

    Raises:
        AccuracyError: they differ by more than rounding.
    """
    found = [_compare(files, predictor, case) for case in cases]
    figures = SamFigures(*(min(column) for column in zip(*found, strict=True)))
    floors = (MIN_COSINE, MIN_COSINE, MIN_AGREEMENT)
    values = (figures.embedding_cosine, figures.decoder_cosine, figures.agreement)
    if any(not value >= floor for value, floor in zip(values, floors, strict=True)):
        raise AccuracyError(
            f"the files in SAM's signature differ from their export on {len(cases)} pictures: "
            f"cosine of embeddings {values[0]:.6f} and logits {values[1]:.6f} (expected "
            f"{MIN_COSINE}), Dice of masks {values[2]:.4f} (expected {MIN_AGREEMENT}). "
            "Nothing was published."
        )
    return figures


def _compare(files: SamFiles, predictor: Predictor, case: Case) -> tuple[float, float, float]:
    canvas, scale, corner = canvas_of(case.image)
    box = case.boxes[:1] * scale + np.array([*corner, *corner], np.float32)
    predictor.set_image(canvas)
    embedding, own = predictor.image_embeddings, files.encode(canvas)
    corners, labels = box.reshape(2, 2), np.array([2, 3])
    wanted = predictor.predict_prompts(boxes=box)
    whole = files.decode(own, corners, labels)
    plain = files.decode(embedding, corners, labels)
    inside = corners.mean(0, keepdims=True)
    outside = corners[:1]
    corrected = predictor.predict_prompts(
        boxes=box,
        point_coords=np.concatenate([inside, outside])[None],
        point_labels=np.array([[1, 0]]),
        mask_input=wanted.known_logits()[:, 0],
    )
    clicks = files.decode(
        embedding,
        np.concatenate([inside, outside, corners]),
        np.array([1, 0, 2, 3]),
        earlier=wanted.known_logits(),
    )
    pairs = ((plain, wanted), (clicks, corrected))
    predictor.set_image(picture := _resized(case.image))
    pixels = files.encode_picture(picture)
    of_picture = 1.0 if pixels is None else cosine(pixels, predictor.image_embeddings)
    return (
        min(cosine(own, embedding), of_picture),
        min(cosine(ours[LOW_RES_MASKS], theirs.known_logits()) for ours, theirs in pairs),
        dice(whole[SAM_MASKS][0, 0] > 0, wanted.masks[0, 0]),
    )
