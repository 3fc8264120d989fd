"""What a model answers for the prompts of one image, wherever it ran, and where masks lie."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .imaging import ByteArray, FloatArray

_LEVEL = 1
"""zlib's quickest level: masks are long runs, and a higher one saves little."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """Masks of N prompts of one image, from a model in this process or from a server.

    Attributes:
        masks: (N, M, H, W) uint8 in the image frame, 1 inside; M is 1, or 3 with multimask.
        ious: (N, M) float32, the decoder's own estimate of each mask's IoU.
        logits: (N, M, 4G, 4G) float32 on the mask grid, usable as a later `mask_input`; None where
            they were not asked for.
    """

    masks: ByteArray
    ious: FloatArray
    logits: FloatArray | None = None

    def known_logits(self) -> FloatArray:
        """The logits, where they are needed.

        Raises:
            InputError: they were not asked for.
        """
        if self.logits is None:
            raise InputError("these masks came without logits: ask the model for them too")
        return self.logits


def extent_of(mask: npt.NDArray[np.generic]) -> tuple[tuple[int, int], ...] | None:
    """First index and the one after the last along each axis of what is not 0; None for nothing."""
    found = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        places = np.flatnonzero(mask.any(axis=others))
        if not len(places):
            return None
        found.append((int(places[0]), int(places[-1]) + 1))
    return tuple(found)


def mask_box(mask: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """(4,) x0, y0, x1, y1 that encloses the pixels of an (H, W) mask, which has some."""
    extent = extent_of(mask)
    if extent is None:
        raise ValueError("a box around an empty mask")
    (top, bottom), (left, right) = extent
    return np.array([left, top, right, bottom], np.float64)


class MaskPacker:
    """Packs masks piece by piece to the bytes of `contract.MASKS_PACKED`."""

    def __init__(self) -> None:
        self._zip = zlib.compressobj(_LEVEL)
        self._parts: list[bytes] = []
        self._rest = np.zeros(0, np.uint8)  # bits that do not fill a byte yet

    def add(self, masks: ByteArray) -> None:
        """Append masks of any shape, values 0 and 1."""
        bits = masks.reshape(-1)
        if len(self._rest):
            bits = np.concatenate([self._rest, bits])
        whole = len(bits) // 8 * 8
        self._rest = bits[whole:].copy()
        self._parts.append(self._zip.compress(np.packbits(bits[:whole]).data))

    def finish(self) -> bytes:
        """All bytes; a last one that is not full ends with zeros."""
        self._parts.append(self._zip.compress(np.packbits(self._rest).data))
        return b"".join([*self._parts, self._zip.flush()])


def unpack_masks(data: bytes, shape: tuple[int, ...]) -> ByteArray:
    """Masks of `shape` from the bytes of `contract.MASKS_PACKED`.

    Raises:
        InputError: not such bytes, or not of that many masks.
    """
    count = math.prod(shape)
    expected = (count + 7) // 8
    unzip = zlib.decompressobj()
    try:
        packed = unzip.decompress(data, expected + 1)
    except zlib.error as error:
        raise InputError(f"packed masks are damaged ({error}): ask for them again") from error
    if len(packed) != expected or not unzip.eof:
        raise InputError(f"packed masks of another size than {shape}: ask for them again")
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=count).reshape(shape)
