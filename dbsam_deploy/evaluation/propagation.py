"""3D boxes as in LiteMedSAM's inference: from the middle slice outwards, mask by mask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import FloatArray
from ..images.volumes import Volume, label_dtype
from ..prediction.segment import Progress
from .boxes import tight_box
from .metrics import BoolArray
from .protocols import CHALLENGE_MARGIN_PX, CHALLENGE_SIDE
from .run import as_bool
from .segmenters import BoxSegmenter, segment_boxes

LabelVolume = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Box3D:
    """A box on each of the slices z0 … z1 - 1.

    Attributes:
        xyxy: (4,) float32 x0, y0, x1, y1 in the image frame.
        z0: first slice.
        z1: the slice after the last.
    """

    xyxy: FloatArray
    z0: int
    z1: int

    @classmethod
    def from_array(cls, box: FloatArray, depth: int) -> Box3D:
        """From x0, y0, z0, x1, y1, z1, half-open along z as `read_npz` gives it.

        Raises:
            InputError: no slice inside it, or slices outside the volume.
        """
        if not np.isfinite(box).all() or not 0 <= int(box[2]) < int(box[5]) <= depth:
            raise InputError(
                f"3D box {box.tolist()} (z1 after the last slice): expected 0 <= z0 < z1 <= {depth}"
            )
        z0, z1 = int(box[2]), int(box[5])
        return cls(box[[0, 1, 3, 4]], z0, z1)

    def as_array(self) -> FloatArray:
        """x0, y0, z0, x1, y1, z1."""
        x0, y0, x1, y1 = self.xyxy
        return np.array([x0, y0, self.z0, x1, y1, self.z1], np.float32)

    @property
    def middle(self) -> int:
        """The slice that is segmented first."""
        return self.z0 + (self.z1 - 1 - self.z0) // 2


def propagate(
    volume: Volume, boxes: dict[int, Box3D], segmenter: BoxSegmenter, progress: Progress
) -> tuple[LabelVolume, int]:
    """Segment a volume with one 3D box a label.

    Upwards from each label's middle slice, then downwards; all labels that are active on a slice
    are decoded in one call. A slice that is on the way of one label upwards and of another
    downwards comes up twice; a `Predictor` that keeps it encodes it once.

    Args:
        volume: slices.
        boxes: label → box.
        segmenter: the model.
        progress: called with visits done and visits in all.

    Returns:
        (D, H, W) label map, the highest label where masks overlap, and the number of slices seen.
    """
    found = np.zeros(volume.shape, label_dtype(max(boxes)))
    up = _visits(boxes, upwards=True)
    down = _visits(boxes, upwards=False)
    middles: dict[int, BoolArray] = {}
    done = 0
    for visits in (up, down):
        previous = dict(middles)
        for index, labels in visits:
            progress(done, len(up) + len(down))
            prompts = [_prompt(boxes[label], previous.get(label), volume) for label in labels]
            prediction = segment_boxes(segmenter, volume.slice_rgb(index), np.stack(prompts))
            for label, mask in zip(labels, as_bool(prediction.masks[:, 0]), strict=True):
                previous[label] = mask
                if index == boxes[label].middle:
                    middles[label] = mask
                here = found[index]
                here[mask & (here < label)] = label
            done += 1
    return found, len({index for index, _ in (*up, *down)})


def _visits(boxes: dict[int, Box3D], *, upwards: bool) -> list[tuple[int, list[int]]]:
    """Slices in order, each with the labels that are segmented on it."""

    def active(index: int) -> list[int]:
        if upwards:
            return [k for k, box in boxes.items() if box.middle <= index < box.z1]
        return [k for k, box in boxes.items() if box.z0 <= index < box.middle]

    top = max(box.z1 for box in boxes.values())
    order: Iterable[int] = range(top) if upwards else range(top - 1, -1, -1)
    return [(index, active(index)) for index in order if active(index)]


def _prompt(box: Box3D, previous: BoolArray | None, volume: Volume) -> FloatArray:
    """The previous mask's box, 3 px wider at 256 scale, or the label's own."""
    if previous is None or not previous.any():
        return box.xyxy
    height, width = volume.shape[1:]
    margin = CHALLENGE_MARGIN_PX * max(height, width) / CHALLENGE_SIDE
    wider = tight_box(previous, inclusive=True) + np.array([-1, -1, 1, 1]) * margin
    return np.asarray(np.clip(wider, 0, (width, height, width, height)), np.float32)
