"""A small graph that takes much memory to run."""

from __future__ import annotations

import itertools

from onnx import TensorProto, helper

SHAPE = [24, 1024, 256]
"""Of its input `x` and its output `y`, float32; a run takes several times as much."""


def chain() -> bytes:
    """The content of its file."""
    names = ["x", *(f"value_{number}" for number in range(6)), "y"]
    nodes = [
        helper.make_node("Softmax" if number % 2 else "Erf", [before], [after])
        for number, (before, after) in enumerate(itertools.pairwise(names))
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *SHAPE[1:]]) for name in "xy"
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    opset = helper.make_opsetid("", 18)
    content: bytes = helper.make_model(
        graph, opset_imports=[opset], ir_version=9
    ).SerializeToString()
    return content
