"""Runtimes behind one interface: tensors of the contract in, tensors of the contract out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ..core.contract import GraphSpec, TensorSpec
from ..core.errors import EngineError, InputError
from ..core.imaging import Arrays, FloatArray

Feed = Arrays
"""A graph's inputs."""

OPENED_LATER = frozenset({"prompt_decoder"})
"""Graphs that a session reads and checks when it opens, and opens when they are first used."""


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
