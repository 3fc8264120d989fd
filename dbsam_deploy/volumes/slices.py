"""A shared predictor asked about the slices of one volume, along any plane."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..core.contract import BOXES, POINT_COORDS
from ..core.imaging import ByteArray, FloatArray, is_constant
from ..core.masks import Prediction
from ..images.volumes import Volume
from ..prediction.predictor import Promptable, prediction_of
from ..prediction.segment import prompts_at_once
from .embeddings import Ahead, ImageKey, SharedPredictor, image_key
from .logits import DISK_BYTES, RAM_BYTES, Answered, LogitsStore, Question
from .objects import Asked, stacked
from .planes import PlaneView, view_along


class VolumeSlices:
    """Masks of prompts on the slices of a volume, in its voxels.

    A slice that holds one value has empty masks, and its model is not asked.

    Args:
        shared: the predictor.
        volume: whose slices.
        logits_bytes: most bytes of logits in memory, and in a scratch file.
    """

    def __init__(
        self,
        shared: SharedPredictor,
        volume: Volume,
        logits_bytes: tuple[int, int] = (RAM_BYTES, DISK_BYTES),
    ) -> None:
        self.shared, self.volume = shared, volume
        self.logits = LogitsStore(self.decode, *logits_bytes)
        self._keys: dict[tuple[int, int], ImageKey | None] = {}

    def along(self, axis: int) -> PlaneView:
        """The slices along an axis; errors as `planes.view_along`."""
        return view_along(self.volume, axis)

    def segment(
        self, view: PlaneView, index: int, asked: Mapping[int, Asked]
    ) -> Iterator[tuple[int, ByteArray, float, Answered | None]]:
        """Several objects' prompts on a slice, those of one form in one call.

        Of the three masks that a single point may mean, the one of the highest predicted IoU.

        Args:
            view: the plane.
            index: the slice.
            asked: label → prompts in voxels of the slice.

        Yields:
            Label, mask (H, W), predicted IoU, and where its logits are, if there are any.
        """
        forms: dict[tuple[object, ...], list[int]] = {}
        for label, one in asked.items():
            forms.setdefault(one.form, []).append(label)
        for labels in forms.values():
            is_vague = asked[labels[0]].is_vague
            has_points = asked[labels[0]].points is not None
            at_once = prompts_at_once(view.square, 3 if is_vague else 1, has_points)
            for start in range(0, len(labels), at_once):
                part = labels[start : start + at_once]
                prompts = stacked([asked[label] for label in part])
                question = Question(view.axis, index, prompts, is_vague)
                found = self.decode(question)
                for row, label in enumerate(part):
                    best = int(np.argmax(found.ious[row]))
                    answered = self._kept(Answered(question, row, best), found)
                    yield label, found.masks[row, best], float(found.ious[row, best]), answered

    def _kept(self, answered: Answered, found: Prediction) -> Answered | None:
        if found.logits is None:
            return None
        self.logits.keep(answered, found.logits[answered.row, answered.alternative])
        return answered

    def decode(self, question: Question) -> Prediction:
        """Answers to a question: masks are (N, M, H, W) in voxels of its slice."""
        view, index = self.along(question.axis), question.index
        key = self._key(view, index)
        if key is None:
            count = next(len(array) for array in question.prompts.values())
            empty = np.zeros((count, 1, *view.size), np.uint8)
            return Prediction(empty, np.zeros((count, 1), np.float32))
        given: dict[str, Any] = {
            name: view.to_square(array) if name in (BOXES, POINT_COORDS) else array
            for name, array in question.prompts.items()
        }

        def ask(predictor: Promptable) -> Prediction:
            return prediction_of(
                predictor,
                multimask=question.multimask,
                adapt_points=question.adapt_points,
                **given,
            )

        found = self.shared.ask(key, lambda: view.image(index), ask)
        return Prediction(view.to_stored(found.masks), found.ious, found.logits)

    def decode_boxes(self, view: PlaneView, index: int, boxes: FloatArray) -> Prediction:
        """Masks (N, 1, H, W) for (N, 4) boxes in the slice's voxels; their logits are kept."""
        question = Question(view.axis, index, {BOXES: boxes})
        found = self.decode(question)
        for row in range(len(boxes)):
            self._kept(Answered(question, row), found)
        return found

    def encode_ahead(self, view: PlaneView, index: int) -> None:
        """Encode the plane's slices while nothing is asked, outwards from `index`."""
        self.shared.encode_ahead(self, self._outwards(view, index))

    def is_encoded(self, view: PlaneView, index: int) -> bool:
        """Whether a prompt on a slice waits for no encoding."""
        key = self._key(view, index)
        return key is None or key in self.shared.store

    def stop_ahead(self) -> None:
        """Encode nothing more ahead."""
        self.shared.stop_ahead(self)

    def _outwards(self, view: PlaneView, index: int) -> Iterator[Ahead]:
        def made(z: int) -> tuple[ImageKey, ByteArray] | None:
            key = self._key(view, z)
            return None if key is None else (key, view.image(z))

        for step in range(view.depth):
            for z in dict.fromkeys((index + step, index - step)):
                if 0 <= z < view.depth:
                    yield partial(made, z)

    def _key(self, view: PlaneView, index: int) -> ImageKey | None:
        """What the slice's embedding is kept under; None where it holds one value only."""
        place = (view.axis, index)
        if place not in self._keys:
            image = view.image(index)
            blank = is_constant(image.reshape(-1, 3))
            self._keys[place] = None if blank else image_key(image)
        return self._keys[place]


class PlaneDecoder:
    """A plane's slices as a chain asks for them."""

    def __init__(self, slices: VolumeSlices, view: PlaneView) -> None:
        self._slices, self._view = slices, view

    def decode(self, index: int, boxes: FloatArray) -> Prediction:
        """See `chain.SliceDecoder`."""
        return self._slices.decode_boxes(self._view, index, boxes)
