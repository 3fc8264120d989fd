"""A quantised graph in two: what lies before its first quantised layer, and the rest.

What a recipe leaves in float at the start of an encoder, it leaves there because it is sensitive:
rounding LiteMedSAM's stem and first stage to bfloat16 costs more than the other stages together. A
runtime that computes in bfloat16 can so keep float32 for the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx.utils import Extractor

from ..core.contract import GraphSpec


@dataclass(frozen=True)
class Split:
    """Two graphs; the output of `head`, named `tensor`, is the input of `rest`."""

    head: onnx.ModelProto
    rest: onnx.ModelProto
    tensor: str


def split_head(model: onnx.ModelProto, spec: GraphSpec) -> Split | None:
    """Split a graph of one input at the last tensor that everything quantised passes through.

    Args:
        model: with shapes, without functions; left as it is.
        spec: its inputs and outputs.

    Returns:
        None for a graph that is not quantised, or whose first layer is.
    """
    tensor = _last_bottleneck(model)
    if tensor is None or len(spec.inputs) != 1:
        return None
    parts = Extractor(model)
    head = parts.extract_model(list(spec.input_names), [tensor])
    return Split(head, parts.extract_model([tensor], list(spec.output_names)), tensor)


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
