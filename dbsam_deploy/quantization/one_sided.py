"""One-sided activations: moved to the middle of a symmetric range, so that no code is wasted.

What leaves a GELU lies between -0.17 and some positive limit. A symmetric quantiser, the only one
that TensorRT takes, spends nearly half of its codes on values that never come. So such a tensor x
is moved by a constant first: W x + b = W (x - c) + (b + W c), where c is a whole number of steps.
The pair stays symmetric; the addition goes into what made x, or into a zero point (`cpu_graph`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .layers import Layer

ONE_SIDED = 0.5
"""A tensor whose least value is above minus this part of its range is one-sided."""
BIAS_SUFFIX = ".recentred"

_QUANTIZE = "QuantizeLinear"


@dataclass(frozen=True)
class Centre:
    """Range of a one-sided tensor: middle and half of its width."""

    middle: float
    half: float


def find_centres(
    model: onnx.ModelProto,
    layers: Iterable[Layer],
    thresholds: dict[str, float],
    lowest: dict[str, float],
) -> dict[str, Centre]:
    """One-sided tensors that only Linear layers with a bias read in eight bits.

    A convolution's padding would have to move as well.

    Args:
        model: the float graph.
        layers: whose inputs are quantised.
        thresholds: tensor → magnitude where it is clipped.
        lowest: tensor → least value that was seen, at most 0.
    """
    biases = _bias_adds(model)
    found: dict[str, Centre] = {}
    refused = set()
    for layer in layers:
        low, high = lowest[layer.source], thresholds[layer.source]
        if layer.op != "MatMul" or layer.node not in biases or low <= -ONE_SIDED * high:
            refused.add(layer.source)
        found[layer.source] = Centre((high + low) / 2, (high - low) / 2)
    return {name: centre for name, centre in found.items() if name not in refused}


def _bias_adds(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """MatMul's name → the Add that is its output's only reader and adds a constant vector."""
    makers = {node.output[0]: node for node in model.graph.node}
    vectors = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 1}
    reads = Counter(name for node in model.graph.node for name in node.input)
    reads.update(value.name for value in model.graph.output)
    found = {}
    for node in model.graph.node:
        if node.op_type != "Add" or vectors.isdisjoint(node.input):
            continue
        for name in node.input:
            maker = makers.get(name)
            if maker is not None and maker.op_type == "MatMul" and reads[name] == 1:
                found[maker.name] = node
    return found


def recentre(model: onnx.ModelProto, layers: Iterable[Layer], centres: dict[str, Centre]) -> None:
    """Move the tensors in front of their pairs, and the biases behind, in place.

    Args:
        model: with int8 pairs, whose scales are for `half` of each centre.
        layers: that are quantised.
        centres: of `find_centres`.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    biases = _bias_adds(model)
    moved: dict[str, float] = {}
    nodes = list(model.graph.node)
    for place, node in reversed(list(enumerate(nodes))):
        if node.op_type != _QUANTIZE or node.input[0] not in centres:
            continue
        source, scale = node.input[0], numpy_helper.to_array(tensors[node.input[1]])
        steps = np.round(centres[source].middle / float(scale))
        moved[source] = float(steps) * float(scale)
        constant = numpy_helper.from_array(
            -np.asarray(moved[source], scale.dtype), f"{source}.middle"
        )
        model.graph.initializer.append(constant)
        name = f"{source}.one_sided"
        nodes.insert(place, helper.make_node("Add", [source, constant.name], [name], name=name))
        node.input[0] = name
    for layer in layers:
        if layer.source in moved:
            _move_bias(model, layer, biases[layer.node], moved[layer.source], tensors)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _move_bias(
    model: onnx.ModelProto,
    layer: Layer,
    add: onnx.NodeProto,
    middle: float,
    tensors: dict[str, onnx.TensorProto],
) -> None:
    """The bias b becomes b + W c, with the rounded W, since that is what multiplies."""
    codes = numpy_helper.to_array(tensors[f"{layer.weight}_quantized"]).astype(np.float64)
    scale = numpy_helper.to_array(tensors[f"{layer.weight}_scale"]).astype(np.float64)
    place = next(i for i, name in enumerate(add.input) if name in tensors)
    bias = numpy_helper.to_array(tensors[add.input[place]])
    moved = bias.astype(np.float64) + middle * codes.sum(axis=0) * scale
    name = f"{layer.node}{BIAS_SUFFIX}"
    model.graph.initializer.append(numpy_helper.from_array(moved.astype(bias.dtype), name))
    add.input[place] = name
