"""Objects of a session → one segmentation that no longer changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..core.imaging import FloatArray, Preprocessing, upscale_logits
from ..images.volumes import Volume, label_dtype
from ..outputs.segmentation import Fractions, Segmentation
from .logits import LogitsStore
from .objects import ObjectMask, TrackedObject
from .planes import view_along


@dataclass(frozen=True)
class AboutModel:
    """What is said of a model beside what it finds.

    Attributes:
        name: in words.
        note: what the user must know of it.
        weights: what tells it from others of that name, where answers are kept.
    """

    name: str = ""
    note: str = ""
    weights: str = ""


UNNAMED = AboutModel()


def segmentation_of(
    volume: Volume,
    tracked: Sequence[TrackedObject],
    how: Preprocessing | None,
    logits: LogitsStore,
    about: AboutModel,
) -> Segmentation:
    """The label map of objects, in the order of their labels; a higher one covers a lower.

    Args:
        volume: what they are on.
        tracked: the objects.
        how: how images enter the model, without which logits have no place in the image.
        logits: of what was decoded.
        about: the model.
    """
    labels = np.zeros(volume.shape, label_dtype(tracked[-1].about.label))
    for one in tracked:
        extent = one.mask.extent
        if extent is not None:
            here = labels[tuple(slice(first, end) for first, end in extent)]
            here[one.mask.read(extent)] = one.about.label
    confidence = np.stack([one.confidence(0, volume.shape) for one in tracked])
    objects = tuple(one.about for one in tracked)
    fractions = None if how is None else _fractions(volume, tracked, how, logits)
    return Segmentation(volume, labels, objects, confidence, about.name, fractions, about.note)


def _fractions(
    volume: Volume, tracked: Sequence[TrackedObject], how: Preprocessing, store: LogitsStore
) -> Fractions | None:
    """Probabilities, if any slice has them: where no stored slice was decoded, 0 and 1."""
    masks: Mapping[int, ObjectMask] = {one.about.label: one.mask.copy() for one in tracked}
    answers = {
        (one.about.label, index): decoded.answered
        for one in tracked
        for (axis, index), decoded in one.slices.items()
        if axis == 0 and decoded.answered is not None
    }
    if not answers:
        return None
    _, height, width = volume.shape
    square = view_along(volume, 0).square

    def fractions(label: int, index: int) -> FloatArray:
        mask = masks[label].read(((index, index + 1), (0, height), (0, width)))[0]
        answered = answers.get((label, index))
        if answered is None:
            return mask.astype(np.float32)
        full = upscale_logits(store.get(answered), square, how)
        if square != (height, width):
            full = np.asarray(
                Image.fromarray(full).resize((width, height), Image.Resampling.BOX), np.float32
            )
        inside = (1 / (1 + np.exp(-np.clip(full, -60, 60)))).astype(np.float32)
        # What was changed after the decoder spoke, on slices across, is certain.
        return np.where((inside > 0.5) == mask, inside, mask).astype(np.float32)

    return fractions
