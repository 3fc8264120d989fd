"""A graph in two: the head, float32 in a runtime that rounds to bfloat16, and the rest.

What a recipe leaves in float at the start of an encoder, it leaves there because it is sensitive:
rounding LiteMedSAM's stem and first stage to bfloat16 costs more than the other stages together.
And bfloat16 has eight bits: of a coordinate up to 1024 it leaves steps of four pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx.utils import Extractor

from ..core.contract import BOXES, POINT_COORDS, GraphSpec
from ..core.errors import EngineError

COORDINATES = frozenset({BOXES, POINT_COORDS})


@dataclass(frozen=True)
class Split:
    """Two graphs; the outputs of `head`, named `tensors`, are inputs of `rest`."""

    head: onnx.ModelProto
    rest: onnx.ModelProto
    tensors: tuple[str, ...]


def split_head(model: onnx.ModelProto, spec: GraphSpec) -> Split | None:
    """Split off what must not be rounded: a decoder's coordinates, or the head of an int8 encoder.

    A graph with coordinates is cut behind the sines and cosines of SAM's point encoding, another
    one at the last tensor that everything quantised passes through.

    Args:
        model: with shapes, without functions; left as it is.
        spec: its inputs and outputs.

    Returns:
        None for a graph without coordinates that is not quantised, or whose first layer is.

    Raises:
        EngineError: coordinates go elsewhere than into sines and cosines.
    """
    starts = tuple(name for name in spec.input_names if name in COORDINATES)
    if starts:
        return _cut(model, spec, starts, _encoded(model, spec, starts))
    tensor = _last_bottleneck(model)
    if tensor is None or len(spec.inputs) != 1:
        return None
    return _cut(model, spec, tuple(spec.input_names), (tensor,))


def _cut(
    model: onnx.ModelProto, spec: GraphSpec, starts: tuple[str, ...], tensors: tuple[str, ...]
) -> Split:
    parts = Extractor(model)
    head = parts.extract_model(list(starts), list(tensors))
    others = [name for name in spec.input_names if name not in starts]
    rest = parts.extract_model([*others, *tensors], list(spec.output_names))
    return Split(head, rest, tensors)


def _encoded(model: onnx.ModelProto, spec: GraphSpec, starts: tuple[str, ...]) -> tuple[str, ...]:
    """The sines and cosines of coordinates, which nothing else is made of."""
    fixed = {tensor.name for tensor in model.graph.initializer} | {""}
    inside, found = set(starts), []
    for node in model.graph.node:
        if fixed.issuperset(node.input):
            fixed |= set(node.output)
        elif inside.isdisjoint(node.input):
            continue
        elif not (inside | fixed).issuperset(node.input) or spec.output_names[0] in node.output:
            raise EngineError(
                f"{spec.name}: its coordinates are not encoded as in SAM, and bfloat16 would round "
                "them: take float32"
            )
        elif node.op_type in ("Sin", "Cos"):
            found.append(node.output[0])
        else:
            inside |= set(node.output)
    return tuple(found)


def _last_bottleneck(model: onnx.ModelProto) -> str | None:
    """The last tensor before the first QuantizeLinear that alone carries the image on."""
    nodes = model.graph.node
    last_read = {name: i for i, node in enumerate(nodes) for name in node.input}
    fixed = {tensor.name for tensor in model.graph.initializer} | {""}
    alive = {value.name for value in model.graph.input} - fixed
    found = None
    for i, node in enumerate(nodes):
        if fixed.issuperset(node.input):
            fixed |= set(node.output)
            continue
        if node.op_type == "QuantizeLinear":
            return found
        alive |= set(node.output)
        alive = {name for name in alive if last_read.get(name, -1) > i}
        if len(alive) == 1:
            (found,) = alive
    return None
