"""Objects of a session → one segmentation that no longer changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..core.imaging import FloatArray, Preprocessing, upscale_logits
from ..images.volumes import Volume, label_dtype
from ..outputs.segmentation import Fractions, Segmentation
from .objects import ObjectMask, TrackedObject
from .planes import view_along


def segmentation_of(
    volume: Volume,
    tracked: Sequence[TrackedObject],
    how: Preprocessing | None,
    model: str,
    note: str,
) -> Segmentation:
    """The label map of objects, in the order of their labels; a higher one covers a lower.

    Args:
        volume: what they are on.
        tracked: the objects.
        how: how images enter the model, without which logits have no place in the image.
        model: its name.
        note: what the user must know of it.
    """
    labels = np.zeros(volume.shape, label_dtype(tracked[-1].about.label))
    for one in tracked:
        extent = one.mask.extent
        if extent is not None:
            here = labels[tuple(slice(first, end) for first, end in extent)]
            here[one.mask.read(extent)] = one.about.label
    confidence = np.stack([one.confidence(0, volume.shape) for one in tracked])
    objects = tuple(one.about for one in tracked)
    fractions = None if how is None else _fractions(volume, tracked, how)
    return Segmentation(volume, labels, objects, confidence, model, fractions, note)


def _fractions(
    volume: Volume, tracked: Sequence[TrackedObject], how: Preprocessing
) -> Fractions | None:
    """Probabilities, if any slice has them: where no stored slice was decoded, 0 and 1."""
    masks: Mapping[int, ObjectMask] = {one.about.label: one.mask.copy() for one in tracked}
    kept: dict[tuple[int, int], npt.NDArray[np.float16]] = {
        (one.about.label, index): decoded.logits
        for one in tracked
        for (axis, index), decoded in one.slices.items()
        if axis == 0 and decoded.logits is not None
    }
    if not kept:
        return None
    _, height, width = volume.shape
    square = view_along(volume, 0).square

    def fractions(label: int, index: int) -> FloatArray:
        mask = masks[label].read(((index, index + 1), (0, height), (0, width)))[0]
        logits = kept.get((label, index))
        if logits is None:
            return mask.astype(np.float32)
        full = upscale_logits(logits.astype(np.float32), square, how)
        if square != (height, width):
            full = np.asarray(
                Image.fromarray(full).resize((width, height), Image.Resampling.BOX), np.float32
            )
        inside = (1 / (1 + np.exp(-np.clip(full, -60, 60)))).astype(np.float32)
        # What was changed after the decoder spoke, on slices across, is certain.
        return np.where((inside > 0.5) == mask, inside, mask).astype(np.float32)

    return fractions
