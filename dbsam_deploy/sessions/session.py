"""Runtimes behind one interface: tensors of the contract in, tensors of the contract out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from ..core.contract import NUM_BOXES, NUM_PROMPTS, GraphSpec, TensorSpec
from ..core.errors import EngineError, InputError
from ..core.imaging import Arrays, FloatArray
from ..core.prompt_adapter import AT_ONCE

Feed = Arrays
"""A graph's inputs."""

OPENED_LATER = frozenset({"prompt_decoder"})
"""Graphs that a session reads and checks when it opens, and opens when they are first used."""


RunPart = Callable[[Feed, bool], dict[str, FloatArray]]
"""Runs a graph on a part of its prompts; the flag is set for the last one of several."""


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


Found = Mapping[str, tuple[str, Sequence[int | str | None]]]
"""Tensors that a file has: name → dtype and sizes; a size that is not fixed is no int."""


def check_contract(spec: GraphSpec, inputs: Found, outputs: Found) -> None:
    """Compare the tensors of an opened graph with the contract.

    Raises:
        EngineError: other names, dtypes or fixed sizes; a file of another graph or model.
    """
    for kind, wanted, found in (
        ("inputs", spec.inputs, inputs),
        ("outputs", spec.outputs, outputs),
    ):
        if {tensor.name for tensor in wanted} != set(found):
            names = ", ".join(tensor.name for tensor in wanted)
            raise EngineError(
                f"the file of {spec.name} has the {kind} {', '.join(found)[:200]}, "
                f"expected {names}: export again"
            )
        for tensor in wanted:
            _check_tensor(spec, tensor, *found[tensor.name])


def _check_tensor(
    spec: GraphSpec, tensor: TensorSpec, dtype: str, sizes: Sequence[int | str | None]
) -> None:
    fits = len(sizes) == len(tensor.axes) and all(
        not isinstance(size, int) if isinstance(axis, str) else size == axis
        for axis, size in zip(tensor.axes, sizes, strict=True)
    )
    if dtype != tensor.dtype or not fits:
        raise EngineError(
            f"the file of {spec.name} has {tensor.name} as {dtype} {tuple(sizes)}, expected "
            f"{tensor.dtype} {tensor.axes}: export again"
        )


def run_in_parts(spec: GraphSpec, feed: Feed, run: RunPart) -> dict[str, FloatArray]:
    """Run a graph on a CPU, `AT_ONCE` of its prompts after the other.

    Its memory grows with them, by 25 MiB each at SAM's size, and more at once are no quicker.

    Args:
        spec: its inputs and outputs.
        feed: checked.
        run: runs it on a part.

    Returns:
        What it gives for all prompts at once, bit for bit.
    """
    axes = {
        tensor.name: axis
        for tensor in (*spec.inputs, *spec.outputs)
        for axis, name in tensor.dynamic_axes.items()
        if name in (NUM_BOXES, NUM_PROMPTS)
    }
    count = max((feed[name].shape[axes[name]] for name in feed if name in axes), default=0)
    if count <= AT_ONCE:
        return run(feed, False)
    whole: dict[str, FloatArray] = {}
    for start in range(0, count, AT_ONCE):
        span = range(start, min(start + AT_ONCE, count))
        given = {
            name: array.take(span, axes[name]) if name in axes else array
            for name, array in feed.items()
        }
        for name, values in run(given, span.stop == count).items():
            if name not in whole:
                shape = list(values.shape)
                shape[axes[name]] = count
                whole[name] = np.empty(shape, values.dtype)
            into = np.moveaxis(whole[name], axes[name], 0)
            into[span.start : span.stop] = np.moveaxis(values, axes[name], 0)
    return whole
