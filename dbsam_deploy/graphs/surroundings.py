"""Nodes before and behind a graph that is finished: its weights stay where they are."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from ..core.contract import GraphSpec, TensorSpec
from ..core.scaling import PIXEL_MEAN, PIXEL_STD

TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "int32": onnx.TensorProto.INT32,
    "uint8": onnx.TensorProto.UINT8,
}
"""Contract dtype → ONNX's."""


def put_around(
    model: onnx.ModelProto,
    spec: GraphSpec,
    before: Iterable[onnx.NodeProto],
    behind: Iterable[onnx.NodeProto],
    name: str = "",
) -> None:
    """Give a graph further nodes, and the inputs and outputs of `spec`.

    Args:
        model: it is changed.
        spec: what it takes and gives from now on.
        before: nodes that make its inputs.
        behind: nodes that take its outputs.
        name: of the graph; by default the spec's behind `sam_`.
    """
    graph = model.graph
    nodes = [*before, *graph.node, *behind]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.name = name or f"sam_{spec.name}"
    graph.input.extend(map(value_info, spec.inputs))
    graph.output.extend(map(value_info, spec.outputs))


def value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    """A tensor of the contract as ONNX describes it."""
    return onnx.helper.make_tensor_value_info(spec.name, TYPES[spec.dtype], spec.axes)


def statistics(stem: str) -> str:
    """SAM's statistics as `<stem>mean` and `<stem>std`, (1, 3, 1, 1), in ONNX's text."""
    mean, std = (", ".join(map(str, values.tolist())) for values in (PIXEL_MEAN, PIXEL_STD))
    return f"""
            {stem}mean = Constant <value = float[1,3,1,1] {{{mean}}}> ()
            {stem}std = Constant <value = float[1,3,1,1] {{{std}}}> ()"""
