"""Image and prompts in, masks out: on a session in this process, or through a Triton server."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, Unpack, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..core.contract import (
    BOXES,
    IMAGE_EMBEDDINGS,
    IOU_PREDICTIONS,
    LOW_RES_MASKS,
    MASK_BITS,
    NUM_MASK_TOKENS,
)
from ..core.errors import InputError, ServingError
from ..core.features import pack, unpack
from ..core.graph_imaging import encoder_feed, make_masks
from ..core.imaging import (
    Arrays,
    FloatArray,
    Preprocessing,
    check_boxes,
    check_contrast,
    check_image,
    to_model_frame,
)
from ..core.masks import Prediction
from ..core.points import NATIVE, PointRules
from ..core.prompt_adapter import PromptAdapter
from ..core.prompts import DecoderPrompts, Places, boxes_alone, check_mask_input, join_prompts
from ..core.requests import planned_sets
from ..sessions.session import Session

if TYPE_CHECKING:  # a local prediction, and an export's key, do without the client
    from ..clients.client import DbsamClient, OpenImage


class Promptable(Protocol):
    """What segments an image with prompts, wherever its model runs."""

    def set_image(self, image: npt.NDArray[Any]) -> None:
        """Take `image` ((H, W, 3) uint8 RGB) for the following calls."""
        ...

    def predict_boxes(self, boxes: npt.NDArray[Any]) -> Prediction:
        """One independent mask for each of (N, 4) boxes in the image frame."""
        ...

    def predict_prompts(self, **asked: Unpack[DecoderPrompts]) -> Prediction:
        """One prediction for each of N prompt sets, see `Predictor.predict_prompts`."""
        ...


def prediction_of(predictor: Promptable, **asked: Unpack[DecoderPrompts]) -> Prediction:
    """Masks for N prompt sets, see `Predictor.predict_prompts`; of boxes alone by their decoder."""
    boxes = boxes_alone(**asked)
    return predictor.predict_prompts(**asked) if boxes is None else predictor.predict_boxes(boxes)


@runtime_checkable
class Encoding(Promptable, Protocol):
    """A `Promptable` whose encoder and decoder are asked apart, so that embeddings can be kept."""

    def encode(self, image: npt.NDArray[Any]) -> FloatArray:
        """Embedding of an image ((H, W, 3) uint8 RGB): float32, (1, ...), see `features.pack`."""
        ...

    def set_embeddings(self, image_embeddings: FloatArray, original_size: tuple[int, int]) -> None:
        """Take an embedding of an image of this height and width for the following calls."""
        ...


class Predictor:
    """Segments images with one session, and encodes an image once, however often it comes back.

    Args:
        session: runtime with the graphs.
        preprocessing: how images enter the model; must match the graphs' image size.
        kept_embeddings: images whose embedding is kept, by their content; the least recently used
            goes first. One is 4 MiB at SAM's size.
        points: how prompts with points are answered; by default by the decoder.
    """

    def __init__(
        self,
        session: Session,
        preprocessing: Preprocessing,
        *,
        kept_embeddings: int = 1,
        points: PointRules = NATIVE,
    ) -> None:
        if kept_embeddings < 1:
            raise InputError(f"kept_embeddings {kept_embeddings}: expected at least 1")
        self.session = session
        self.preprocessing, self.points = preprocessing, points
        self._kept = kept_embeddings
        self._embeddings: OrderedDict[bytes, FloatArray] = OrderedDict()
        self._image_embeddings: FloatArray | None = None
        self._original_size = (0, 0)

    @property
    def image_embeddings(self) -> FloatArray:
        """(1, 256, G, G) of the image that was set.

        Raises:
            InputError: none was.
        """
        found: FloatArray = unpack(self._current(), self.preprocessing)[IMAGE_EMBEDDINGS]
        return found

    def set_embeddings(self, image_embeddings: FloatArray, original_size: tuple[int, int]) -> None:
        """Use what `encode` made before of an image of `original_size`."""
        self._image_embeddings, self._original_size = image_embeddings, original_size

    def set_image(self, image: npt.NDArray[Any]) -> None:
        """Encode `image` ((H, W, 3) uint8 RGB) for the following `predict` calls.

        Raises:
            InputError: see `check_image` and `check_contrast`.
        """
        image = check_contrast(check_image(image))
        size = (image.shape[0], image.shape[1])
        key = hashlib.blake2b(image.tobytes(), key=repr(size).encode()).digest()
        if key in self._embeddings:
            self._embeddings.move_to_end(key)
        else:
            self._embeddings[key] = self.encode(image)
            if len(self._embeddings) > self._kept:
                self._embeddings.popitem(last=False)
        self.set_embeddings(self._embeddings[key], size)

    def forget_images(self) -> None:
        """Keep no embedding: the next image is encoded, whether it was seen before or not."""
        self._embeddings.clear()
        self._image_embeddings = None

    def encode(self, image: npt.NDArray[Any]) -> FloatArray:
        """Embedding of `image` ((H, W, 3) uint8 RGB), which is not kept, see `features.pack`.

        Raises:
            InputError: see `check_image`.
        """
        feed = encoder_feed(image, self.preprocessing)
        return pack(self.session.run("encoder", feed), self.preprocessing)

    def predict_boxes(self, boxes: npt.NDArray[Any]) -> Prediction:
        """One independent mask for each box.

        Args:
            boxes: (N, 4) x0, y0, x1, y1 in the image frame.

        Raises:
            InputError: no image was set, or see `check_boxes`.
        """
        self._current()
        values = check_boxes(boxes, self._original_size)
        model_boxes = to_model_frame(values, self._original_size, self.preprocessing)
        return self._prediction(*self._decode("decoder", {BOXES: model_boxes}))

    def predict_prompts(
        self,
        *,
        mask_input: npt.NDArray[Any] | None = None,
        multimask: bool = False,
        adapt_points: bool = True,
        **places: Unpack[Places],
    ) -> Prediction:
        """One prediction for each of N prompt sets: box, points and an earlier mask, combined.

        Args:
            mask_input: (N, 4G, 4G) float logits, as in `Prediction.logits`.
            multimask: return the three alternatives instead of the single mask.
            adapt_points: answer points as the model's `points` say; else as its decoder does.
            **places: `boxes`, `point_coords` and `point_labels`, see `core.prompts.Places`.

        Raises:
            InputError: no image, neither boxes nor points, or arrays that do not fit together.
        """
        self._current()
        size, how = self._original_size, self.preprocessing
        coords, labels = join_prompts(size, **places)
        count, masks, has_mask = len(coords), None, None
        if mask_input is not None:
            masks, has_mask = check_mask_input(mask_input, count, how.mask_side), np.ones(count)
        prompts = planned_sets(
            *(coords, labels, masks, has_mask, size, how),
            tokens=slice(1, NUM_MASK_TOKENS) if multimask else slice(0, 1),
            rules=self.points if adapt_points else NATIVE,
        )
        adapter = PromptAdapter(how, size, self._decode)
        return self._prediction(*prompts.decoded(range(count), self._decode, adapter))

    def _decode(self, graph: str, feed: Arrays) -> tuple[FloatArray, FloatArray]:
        """See `prompt_adapter.Decode`."""
        batch = {name: array[None] for name, array in feed.items()}
        out = self.session.run(graph, {**unpack(self._current(), self.preprocessing), **batch})
        return out[LOW_RES_MASKS][0], out[IOU_PREDICTIONS][0]

    def _current(self) -> FloatArray:
        if self._image_embeddings is None:
            raise InputError("no image: call set_image before asking for masks")
        return self._image_embeddings

    def _prediction(self, logits: FloatArray, ious: FloatArray) -> Prediction:
        masks = make_masks(logits, self._original_size, self.preprocessing, self._mask_bits)
        return Prediction(masks, ious, logits)

    def _mask_bits(self, feed: Arrays) -> npt.NDArray[Any]:
        """See `graph_imaging.RunMasks`."""
        return self.session.run(MASK_BITS, feed)[MASK_BITS]


class ServedPredictor:
    """A Triton server as a `Promptable`: it encodes an image once and is asked by the image's id.

    Args:
        client: connected.
        logits: ask for the logits, too.
    """

    def __init__(self, client: DbsamClient, *, logits: bool = True) -> None:
        self.client = client
        self._logits = logits
        self._image: OpenImage | None = None
        self._points: PointRules | None = None
        self._has_asked = False

    def set_image(self, image: npt.NDArray[Any]) -> None:
        """See `Promptable`; it is sent with the first prompt, if the server lacks it.

        Raises:
            InputError: see `check_image` and `check_contrast`.
        """
        before, self._image = self._image, None  # never answer for the one before
        pixels = check_contrast(check_image(image))
        same = before is not None and np.array_equal(before.known.pixels, pixels)
        self._image = before if same else self.client.take(pixels)

    @property
    def points(self) -> PointRules | None:
        """How the server answers prompts with points; None where it does not say so.

        It is asked once, when somebody first wants to know.
        """
        if not self._has_asked:
            self._has_asked = True
            with suppress(InputError, ServingError):  # a proxy may keep it to itself
                self._points = self.client.points()
        return self._points

    def predict_boxes(self, boxes: npt.NDArray[Any]) -> Prediction:
        """See `Predictor.predict_boxes`; errors are those of `DbsamClient.segment`."""
        return self._current().predict_boxes(boxes, logits=self._logits)

    def predict_prompts(self, **asked: Unpack[DecoderPrompts]) -> Prediction:
        """See `Predictor.predict_prompts`; errors are those of `DbsamClient.segment_prompts`."""
        return self._current().predict_prompts(logits=self._logits, **asked)

    def _current(self) -> OpenImage:
        if self._image is None:
            raise InputError("no image: call set_image before asking for masks")
        return self._image
