"""`dbsam_interactive` without Triton: an image or its id, and prompts → masks.

The embedding is looked up before the image is looked at, prompts are checked before anything is
computed, boxes go through the decoder a few at a time, and only wanted outputs are made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .contract import (
    ANY_IOU_SCORES,
    ANY_MASKS,
    BOX_IOU_SCORES,
    BOX_MASKS,
    BOXES,
    CACHED,
    IMAGE_ID,
    LOW_RES_LOGITS,
    MASKS_PACKED,
    RAW_IMAGE,
)
from .embedding_cache import EmbeddingCache, Kept
from .errors import InputError
from .graph_imaging import encoder_feed, make_masks
from .image_id import image_id
from .imaging import (
    Arrays,
    ByteArray,
    FloatArray,
    Preprocessing,
    check_contrast,
    check_finite,
    check_image,
)
from .masks import MaskPacker
from .points import NATIVE, PointRules
from .prompt_adapter import Decode, PromptAdapter
from .refusal import RefusedError
from .requests import ReadPrompts, read_prompts

_ID_LENGTH = 64


class Graphs(Protocol):
    """What runs the encoder and the decoders."""

    def encode(self, feed: Arrays) -> tuple[Any, int]:
        """An image, see `graph_imaging.encoder_feed` → an embedding for `decode`, and its bytes."""

    def decode(self, graph: str, embedding: Any, feed: Arrays) -> tuple[FloatArray, FloatArray]:
        """Prompts (n, …) in the model frame → logits (n, M, 4G, 4G) and their IoU (n, M)."""

    def mask_bits(self, feed: Arrays) -> ByteArray:
        """See `graph_imaging.RunMasks`; only where the model has such a graph."""


@dataclass(frozen=True)
class Interactive:
    """Answers requests from several threads.

    Attributes:
        how: mode and sizes of the model.
        graphs: runs the graphs.
        cache: embeddings that are kept.
        chunk: boxes or prompt sets that the decoder gets at once; its memory grows with it.
        rules: how prompts with points are answered.
    """

    how: Preprocessing
    graphs: Graphs
    cache: EmbeddingCache
    chunk: int
    rules: PointRules = NATIVE

    def answer(self, arrays: Arrays, wanted: Collection[str], check: Callable[[], None]) -> Arrays:
        """The outputs of `contract.interactive_spec`.

        Args:
            arrays: the inputs that the request has.
            wanted: names of the outputs that it asks for.
            check: raises when the answer has no use any more.

        Returns:
            Those of the wanted outputs that there are: masks only if there are prompts.

        Raises:
            InputError: neither image nor id, or one of them or a prompt is not usable.
            RefusedError: an image id that is not kept, or what `check` raises.
            EngineError: logits that are not finite.
        """
        check()
        name, kept, cached, prompts = self._open(arrays, check, IMAGE_ID.name in wanted)
        answer: Arrays = {
            IMAGE_ID.name: np.array([name.encode()], object),
            CACHED.name: np.array([cached], np.uint8),
        }
        if prompts is not None:
            answer.update(self._masks(kept, prompts, set(wanted), check))
        return {name: array for name, array in answer.items() if name in wanted}

    def _open(
        self, arrays: Arrays, check: Callable[[], None], lasting: bool
    ) -> tuple[str, Kept, bool, ReadPrompts | None]:
        asked = _asked(arrays)
        if RAW_IMAGE.name in arrays:
            image = check_image(arrays[RAW_IMAGE.name])
            name = image_id(image)
            if asked not in (None, name):
                raise InputError(f"image_id {asked} is not that of raw_image, {name}: send one")
            prompts = self._read(arrays, (image.shape[0], image.shape[1]))
            kept, cached = self.cache.get_or_make(
                name, lambda: self._encode(image), check, lasting=lasting
            )
            return name, kept, cached, prompts
        if asked is None:
            raise InputError("no image: send raw_image, or the image_id of an earlier answer")
        found = self.cache.get(asked)
        if found is None:
            raise RefusedError(
                f"image_id {asked}: not kept (any more): send raw_image", "NOT_FOUND"
            )
        return asked, found, True, self._read(arrays, found.original_size)

    def _read(self, arrays: Arrays, size: tuple[int, int]) -> ReadPrompts | None:
        return read_prompts(arrays, size, self.how, self.rules)

    def _encode(self, image: ByteArray) -> Kept:
        feed = encoder_feed(check_contrast(image), self.how)
        embedding, nbytes = self.graphs.encode(feed)
        return Kept(embedding, (image.shape[0], image.shape[1]), nbytes)

    def _decoder(self, kept: Kept, check: Callable[[], None]) -> Decode:
        def decode(graph: str, feed: Arrays) -> tuple[FloatArray, FloatArray]:
            check()
            return self.graphs.decode(graph, kept.embedding, feed)

        return decode

    def _masks(
        self, kept: Kept, prompts: ReadPrompts, wanted: set[str], check: Callable[[], None]
    ) -> Arrays:
        size, count = kept.original_size, prompts.count
        whole = bool(wanted & {ANY_MASKS.name, BOX_MASKS.name})
        masks = np.empty((count, prompts.masks, *size), np.uint8) if whole else None
        packer = MaskPacker() if MASKS_PACKED.name in wanted else None
        logits: list[FloatArray] = []
        ious: list[FloatArray] = []
        decode = self._decoder(kept, check)
        adapter = PromptAdapter(self.how, size, decode, self.chunk)
        for start in range(0, count, self.chunk):
            part = slice(start, start + self.chunk)
            low, iou = prompts.decoded(range(count)[part], decode, adapter)
            ious.append(iou)
            if masks is not None or packer is not None:
                into = None if masks is None else masks[part]
                some = make_masks(low, size, self.how, self.graphs.mask_bits, into)
                if packer is not None:
                    packer.add(some)
            else:
                check_finite(low)
            if LOW_RES_LOGITS in wanted:
                logits.append(low)
        answer: Arrays = {ANY_IOU_SCORES.name: np.concatenate(ious)}
        if logits:
            answer[LOW_RES_LOGITS] = np.concatenate(logits)
        if packer is not None:
            answer[MASKS_PACKED.name] = np.array([packer.finish()], object)
        if masks is not None:
            answer[ANY_MASKS.name] = masks
        if BOXES in prompts.feed:
            answer[BOX_IOU_SCORES.name] = answer[ANY_IOU_SCORES.name][:, 0]
            if masks is not None:
                answer[BOX_MASKS.name] = masks[:, 0]
        return answer


def _asked(arrays: Arrays) -> str | None:
    """The image id of a request, if it has one."""
    given: npt.NDArray[Any] | None = arrays.get(IMAGE_ID.name)
    if given is None:
        return None
    value = given.reshape(-1)[0]
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
    if len(text) != _ID_LENGTH or set(text) - set("0123456789abcdef"):
        raise InputError(f"image_id {text[:80]!r}: expected {_ID_LENGTH} hexadecimal digits")
    return text
