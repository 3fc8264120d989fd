"""Runtimes behind one interface: tensors of the contract in, tensors of the contract out."""

from __future__ import annotations

from typing import Protocol

from ..core.contract import GraphSpec
from ..core.errors import InputError
from ..core.imaging import Arrays, FloatArray

Feed = Arrays
"""A graph's inputs."""


class Session(Protocol):
    """Runs the graphs of one model; `backend` names the runtime."""

    backend: str

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        """Run `graph` (`encoder`, `decoder`, `prompt_decoder`) on arrays named by its contract."""
        ...


def check_feed(spec: GraphSpec, feed: Feed) -> None:
    """Compare a feed with the contract before a runtime sees it.

    Raises:
        InputError: a missing or unknown name, another dtype, or a shape that does not fit.
    """
    if set(feed) != set(spec.input_names):
        raise InputError(f"{spec.name}: got inputs {sorted(feed)}, expected {spec.input_names}")
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        array = feed[tensor.name]
        if array.dtype != tensor.dtype:
            raise InputError(f"{tensor.name}: dtype {array.dtype}, expected {tensor.dtype}")
        fits = array.ndim == len(tensor.axes) and all(
            size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis) and size > 0
            for size, axis in zip(array.shape, tensor.axes, strict=True)
        )
        if not fits:
            raise InputError(f"{tensor.name}: shape {array.shape}, expected {tensor.axes}")
