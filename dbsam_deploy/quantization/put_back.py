"""A quantised graph → the same one with some layers in float again, without quantising anew.

A sweep tries dozens of choices of the same layers. ONNX Runtime's tools take seconds for each,
nearly all of it for weights that are the same every time.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from .layers import Layer
from .one_sided import BIAS_SUFFIX
from .qdq import spare_other_readers


def put_back(
    whole: onnx.ModelProto,
    original: onnx.ModelProto,
    layers: Iterable[Layer],
    chosen: list[Layer],
    outputs: Iterable[str],
) -> onnx.ModelProto:
    """The graph that `quantize_graph` makes of `chosen`, from that of all layers.

    Args:
        whole: every layer that may be chosen is quantised; left unchanged.
        original: the same graph before.
        layers: all layers of the graph.
        chosen: those that stay quantised.
        outputs: operators whose output is quantised as well, see `recipe.Quantization`.
    """
    model = onnx.ModelProto()
    model.CopyFrom(whole)
    kept = {layer.node for layer in chosen}
    weights = {layer.node: layer.weight for layer in layers if layer.node not in kept}
    originals = {node.name: node for node in original.graph.node}
    moved = {f"{name}{BIAS_SUFFIX}" for name in weights}
    wanted: set[str] = set()
    for node in model.graph.node:
        if node.name in weights or moved & set(node.input):
            node.input[:] = originals[node.name].input
            wanted |= set(node.input)
    here = {tensor.name for tensor in model.graph.initializer}
    missing = wanted - here
    model.graph.initializer.extend(t for t in original.graph.initializer if t.name in missing)
    spare_other_readers(model, chosen, set(outputs))
    _drop_unused(model)
    return model


def _drop_unused(model: onnx.ModelProto) -> None:
    graph = model.graph
    used = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if used & set(node.output):
            used |= set(node.input)
            nodes.append(node)
    constants = [tensor for tensor in graph.initializer if tensor.name in used]
    values = [value for value in graph.value_info if value.name in used]
    for field, items in (
        (graph.node, nodes[::-1]),
        (graph.initializer, constants),
        (graph.value_info, values),
    ):
        del field[:]
        field.extend(items)
