"""All that an encoder made of an image, as one array that can be kept and handed on."""

from __future__ import annotations

import math

import numpy as np

from .contract import IMAGE_EMBEDDINGS, Geometry, TensorSpec, encoder_spec
from .errors import InputError
from .imaging import Arrays, FloatArray


def pack(outputs: Arrays, size: Geometry) -> FloatArray:
    """The encoder's outputs for one image as one array.

    Args:
        outputs: by name, float32, each with a batch axis of 1.
        size: of the model.

    Returns:
        (1, 256, G, G) image embedding, or (1, K) with all that the decoders take, in the contract's
        order, where that is more (`Geometry.high_res`).
    """
    if not size.high_res:
        return outputs[IMAGE_EMBEDDINGS]
    names = encoder_spec(size).output_names
    return np.concatenate([outputs[name].reshape(1, -1) for name in names], axis=1)


def unpack(packed: FloatArray, size: Geometry) -> Arrays:
    """What decoders take from the encoder, by name: the reverse of `pack`, as views.

    Raises:
        InputError: an array of another model.
    """
    if not size.high_res:
        return {IMAGE_EMBEDDINGS: packed}
    shapes = {spec.name: _shape(spec) for spec in encoder_spec(size).outputs}
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    if packed.shape != (1, ends[-1]):
        raise InputError(f"features of shape {packed.shape}: expected (1, {ends[-1]})")
    parts = np.split(packed, ends[:-1], axis=1)
    return {
        name: part.reshape(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)
    }


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    """Of one image."""
    return tuple(axis if isinstance(axis, int) else 1 for axis in spec.axes)
