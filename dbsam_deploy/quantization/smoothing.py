"""SmoothQuant on an ONNX graph: ranges move from a LayerNorm's output into the next weights.

One scale for a whole activation is set by its largest channel, and the others lose resolution. So
channel c of a LayerNorm's output is divided by s[c] = max|x[c]|^α / max|W[c]|^(1-α) and the rows of
the following weights are multiplied by it; the product stays the same (Xiao et al., 2023). The
division is folded into the LayerNorm's own weight and bias: the graph gets no new node.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from ..core.imaging import FloatArray

MOVING = ("Reshape", "Transpose", "Pad", "Slice", "Identity")
"""Operators that only move tokens between a LayerNorm and its Linear layers."""
MIN_SCALE = 1e-5


def smooth(
    model: onnx.ModelProto, layers: list[str], largest: dict[str, FloatArray], alpha: float
) -> int:
    """Smooth every LayerNorm whose readers are all chosen MatMuls, in place.

    Args:
        model: graph in standard operators.
        layers: names of the MatMuls that may be changed.
        largest: tensor that enters a MatMul → largest magnitude of each channel.
        alpha: 0 to 1; how much of the range moves into the weights.

    Returns:
        LayerNorms that were smoothed.
    """
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    outputs = {value.name for value in model.graph.output}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    uses = {name: len(nodes) for name, nodes in readers.items()}
    done = 0
    for norm in model.graph.node:
        if norm.op_type != "LayerNormalization" or len(norm.input) != 3:
            continue
        linear = _linear_readers(norm.output[0], readers, set(layers), outputs)
        weighted = [node.input[1] for node in linear]
        # A weight that something else reads as well must not change.
        if not linear or any(uses[name] > 1 or name not in tensors for name in weighted):
            continue
        if any(name not in tensors for name in norm.input[1:]):
            continue
        activations = np.max([largest[node.input[0]] for node in linear], axis=0)
        weights = [numpy_helper.to_array(tensors[node.input[1]]) for node in linear]
        scale = smoothing_scale(activations, np.max([np.abs(w).max(1) for w in weights], 0), alpha)
        for place, name in enumerate(norm.input[1:], start=1):
            # A copy: untrained norms share their ones and zeros.
            own = model.graph.initializer.add()
            own.CopyFrom(tensors[name])
            own.name = norm.input[place] = f"{norm.output[0]}.smooth{place}"
            _store(own, numpy_helper.to_array(own) / scale)
        for node, weight in zip(linear, weights, strict=True):
            _store(tensors[node.input[1]], weight * scale[:, None])
        done += 1
    read = {name for node in model.graph.node for name in node.input}
    # The originals, where nothing else reads them.
    for tensor in [t for t in model.graph.initializer if done and t.name not in read]:
        model.graph.initializer.remove(tensor)
    return done


def smoothing_scale(activations: FloatArray, weights: FloatArray, alpha: float) -> FloatArray:
    """s[c] of the module's formula; 1 for a channel that is always zero.

    Args:
        activations: (C,) largest magnitudes.
        weights: (C,) largest magnitudes of each input channel's weights.
        alpha: 0 to 1.
    """
    scale = np.maximum(activations, MIN_SCALE) ** alpha / np.maximum(weights, MIN_SCALE) ** (
        1 - alpha
    )
    dead = (activations <= MIN_SCALE) | (weights <= MIN_SCALE)
    return np.where(dead, 1.0, np.maximum(scale, MIN_SCALE)).astype(np.float32)


def _linear_readers(
    name: str,
    readers: dict[str, list[onnx.NodeProto]],
    layers: set[str],
    outputs: set[str],
) -> list[onnx.NodeProto]:
    """The MatMuls that read a tensor, directly or moved; [] if anything else reads it."""
    found: list[onnx.NodeProto] = []
    for node in readers[name]:
        if node.op_type == "MatMul" and node.name in layers and node.input[0] == name:
            found.append(node)
        elif node.op_type in MOVING and node.input[0] == name and _keeps_channels(node):
            behind = _linear_readers(node.output[0], readers, layers, outputs)
            if not behind:
                return []
            found += behind
        else:
            return []
    return [] if name in outputs else found


def _keeps_channels(node: onnx.NodeProto) -> bool:
    """Whether the last axis stays the last; a Reshape's is seen by its readers' channel count."""
    if node.op_type != "Transpose":
        return True
    perm = next(list(a.ints) for a in node.attribute if a.name == "perm")
    return bool(perm[-1] == len(perm) - 1)


def _store(tensor: onnx.TensorProto, values: npt.NDArray[Any]) -> None:
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    tensor.CopyFrom(numpy_helper.from_array(values.astype(kind), tensor.name))
