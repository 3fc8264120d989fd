"""Named objects on one image or volume: what every output format is written from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.imaging import FloatArray
from ..images.volumes import Volume
from ..prediction.results import Result

Fractions = Callable[[int, int], FloatArray]
"""(label, slice) → (H, W) float32, the model's probability of the object at each pixel, 0 to 1."""


@dataclass(frozen=True)
class CodedTerm:
    """A coded term, as DICOM names things.

    Attributes:
        value: for example `10200004`.
        scheme: for example `SCT` (SNOMED CT).
        meaning: for example `Liver`.
    """

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class SegmentedObject:
    """One object of a segmentation.

    Attributes:
        label: its value in the label map, from 1.
        name: what the user calls it.
        colour: red, green, blue, 0–255; None where the user gave none.
        code: what it is in a coding scheme, where that is known.
    """

    label: int
    name: str
    colour: tuple[int, int, int] | None = None
    code: CodedTerm | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """N named objects on D slices of H×W pixels.

    Attributes:
        image: what was segmented.
        labels: (D, H, W) uint8 or uint16 label map, 0 outside.
        objects: in the order of their labels.
        confidence: (N, D) float32, the decoder's own estimate of the mask's IoU on each slice; NaN
            where an object was not decoded.
        model: name of the model, in words.
        fractions: the objects' probabilities, where they were kept.
        note: what the user must know, for example untrained weights; else empty.
        alternatives: (3, H, W) label maps of a slice's three alternatives, where they were asked
            for.
        min_confidence: objects with a lower predicted IoU are flagged for review in tables; None:
            none are.
    """

    image: Volume
    labels: npt.NDArray[np.unsignedinteger]
    objects: tuple[SegmentedObject, ...]
    confidence: FloatArray
    model: str
    fractions: Fractions | None = None
    note: str = ""
    alternatives: npt.NDArray[np.unsignedinteger] | None = None
    min_confidence: float | None = None

    @property
    def decoded(self) -> npt.NDArray[np.bool_]:
        """(N,) whether an object was decoded on any slice."""
        return np.asarray(np.isfinite(self.confidence).any(axis=1))

    @classmethod
    def from_result(cls, result: Result, model: str) -> Segmentation:
        """The label map of a `Result`, each object named by its prompt."""
        depth = result.image.shape[0]
        confidence = np.full((len(result.ious), depth), np.nan, np.float32)
        decoded = [z for z in result.slices if z not in result.blank_slices]
        confidence[:, decoded] = result.ious.max(axis=1)[:, None]
        boxes_3d = result.prompts.boxes_3d
        if boxes_3d is not None:
            z = np.arange(depth)[None]
            outside = (z < boxes_3d[:, 2:3]) | (z >= boxes_3d[:, 5:6])
            confidence[outside] = np.nan
        objects = tuple(
            SegmentedObject(label, name) for label, name in enumerate(result.prompts.names, 1)
        )
        return cls(
            result.image,
            result.labels,
            objects,
            confidence,
            model,
            note=result.note,
            alternatives=result.alternatives,
        )
