"""Sizes and shapes of one run, from the contract alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ..core.contract import GraphSpec, TensorSpec
from ..core.errors import EngineError

Shape = tuple[int, ...]


def axis_sizes(spec: GraphSpec, feed: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, int]:
    """Size of each dynamic axis in a feed that `sessions.check_feed` has passed."""
    return {
        axis: feed[tensor.name].shape[index]
        for tensor in spec.inputs
        for index, axis in tensor.dynamic_axes.items()
    }


def concrete_shape(tensor: TensorSpec, sizes: Mapping[str, int]) -> Shape:
    """Shape of one tensor at these sizes."""
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.axes)


def concrete_shapes(spec: GraphSpec, sizes: Mapping[str, int]) -> dict[str, Shape]:
    """Shape of every input and output at these sizes."""
    return {t.name: concrete_shape(t, sizes) for t in (*spec.inputs, *spec.outputs)}


def size_bytes(tensor: TensorSpec, shape: Shape) -> int:
    """Bytes of a tensor of this shape."""
    return math.prod(shape) * np.dtype(tensor.dtype).itemsize


def check_outputs(spec: GraphSpec, shapes: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Compare the shapes that a runtime inferred for its outputs with the contract's.

    Raises:
        EngineError: one differs, so that the engine is not this graph's.
    """
    wrong = {
        tensor.name: found[tensor.name]
        for tensor in spec.outputs
        if found[tensor.name] != shapes[tensor.name]
    }
    if wrong:
        wanted = {name: shapes[name] for name in wrong}
        raise EngineError(
            f"{spec.name}: the engine gives outputs of {wrong}, the contract says {wanted}; build "
            "it again"
        )
