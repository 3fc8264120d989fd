"""A shared predictor asked about the slices of one volume, along any plane."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from ..core.contract import BOXES, MASK_INPUT, POINT_COORDS
from ..core.imaging import ByteArray, FloatArray, is_constant
from ..core.masks import Prediction
from ..images.arrays import as_array
from ..images.volumes import Volume
from ..prediction.predictor import Promptable
from .embeddings import Ahead, ImageKey, SharedPredictor, image_key
from .objects import Asked
from .planes import PlaneView, view_along


class VolumeSlices:
    """Masks of prompts on the slices of a volume, in its voxels.

    A slice that holds one value has empty masks, and its model is not asked.

    Args:
        shared: the predictor.
        volume: whose slices.
    """

    def __init__(self, shared: SharedPredictor, volume: Volume) -> None:
        self.shared, self.volume = shared, volume
        self._keys: dict[tuple[int, int], ImageKey | None] = {}

    def along(self, axis: int) -> PlaneView:
        """The slices along an axis; errors as `planes.view_along`."""
        return view_along(self.volume, axis)

    def segment(
        self, view: PlaneView, index: int, asked: Asked, mask_input: Any = None
    ) -> tuple[ByteArray, float, FloatArray | None]:
        """Mask (H, W), predicted IoU and logits (4G, 4G) of one object's prompts on a slice.

        Of the three masks that a single point may mean, the one of the highest predicted IoU.
        """
        earlier = None if mask_input is None else as_array(MASK_INPUT, mask_input)
        if earlier is not None and earlier.ndim == 2:
            earlier = earlier[None]
        is_vague = asked.points is not None and asked.points.shape[1] == 1
        found = self.decode(
            view,
            index,
            multimask=is_vague and asked.box is None and earlier is None,
            boxes=asked.box,
            point_coords=asked.points,
            point_labels=asked.labels,
            mask_input=earlier,
        )
        best = int(np.argmax(found.ious[0]))
        logits = None if found.logits is None else found.logits[0, best]
        return found.masks[0, best], float(found.ious[0, best]), logits

    def decode(
        self,
        view: PlaneView,
        index: int,
        *,
        multimask: bool = False,
        adapt_points: bool = True,
        **prompts: Any,
    ) -> Prediction:
        """Answers to N `PromptArrays` on a slice, all in its voxels: masks are (N, M, H, W)."""
        key = self._key(view, index)
        if key is None:
            count = next(len(array) for array in prompts.values() if array is not None)
            empty = np.zeros((count, 1, *view.size), np.uint8)
            return Prediction(empty, np.zeros((count, 1), np.float32))
        given = {
            name: view.to_square(array) if name in (BOXES, POINT_COORDS) else array
            for name, array in prompts.items()
            if array is not None
        }

        def question(predictor: Promptable) -> Prediction:
            if given.keys() == {BOXES} and not multimask:
                return predictor.predict_boxes(given[BOXES])
            return predictor.predict_prompts(
                multimask=multimask, adapt_points=adapt_points, **given
            )

        found = self.shared.ask(key, lambda: view.image(index), question)
        return Prediction(view.to_stored(found.masks), found.ious, found.logits)

    def encode_ahead(self, view: PlaneView, index: int) -> None:
        """Encode the plane's slices while nothing is asked, outwards from `index`."""
        self.shared.encode_ahead(self, self._outwards(view, index))

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
        return self._slices.decode(self._view, index, boxes=boxes)
