"""The layers of a graph that can be quantised: Linear and dense Conv, by their module paths."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx

from ..core.errors import ExportError
from ..files.onnx_files import SCOPES


@dataclass(frozen=True)
class Layer:
    """One Linear or dense Conv: a node with a constant weight.

    Attributes:
        node: its name in the graph.
        op: MatMul, Gemm or Conv.
        module: path of its module, `image_encoder.blocks.0.mlp.lin1`.
        source: tensor that enters it.
        weight: its initializer.
        output: tensor that leaves it.
        macs: multiplications for one image.
    """

    node: str
    op: str
    module: str
    source: str
    weight: str
    output: str
    macs: int


def find_layers(model: onnx.ModelProto, operators: Iterable[str]) -> tuple[Layer, ...]:
    """The graph's Linear and dense Conv layers; grouped (depthwise) convolutions are none.

    Args:
        model: an exported graph with shapes, batch first.
        operators: see `recipe.OPERATORS`.

    Raises:
        ExportError: a shape that is needed for counting is not known.
    """
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    sizes = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer}
    shapes = {
        value.name: [_size(dim) for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    layers = []
    for node in model.graph.node:
        if node.op_type not in operators or len(node.input) < 2:
            continue
        # A three-dimensional constant is a table of attention (relative positions), no layer.
        if ranks.get(node.input[1]) != (4 if node.op_type == "Conv" else 2):
            continue
        # Depthwise: next to no work, and channels whose ranges differ too much for one scale.
        if any(a.name == "group" and a.i > 1 for a in node.attribute):
            continue
        if node.output[0] not in shapes:
            raise ExportError(f"{node.name}: the shape of {node.output[0]} is not known")
        shape = shapes[node.output[0]]
        places = np.prod(shape[2:]) if node.op_type == "Conv" else np.prod(shape[:-1])
        layers.append(
            Layer(
                node.name,
                node.op_type,
                _module_of(node),
                node.input[0],
                node.input[1],
                node.output[0],
                int(places) * sizes[node.input[1]],
            )
        )
    return tuple(layers)


def _size(dim: onnx.TensorShapeProto.Dimension) -> int:
    """An axis for one image: windows of attention lie on it with the batch, as `25*batch`."""
    return dim.dim_value or math.prod(map(int, re.findall(r"(?<!\w)\d+", dim.dim_param)))


def _module_of(node: onnx.NodeProto) -> str:
    scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), "['']")
    paths = [str(path) for path in ast.literal_eval(scopes)]
    return paths[-2] if len(paths) > 1 else node.name


def is_excluded(module: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns (fnmatch) names the module."""
    return any(fnmatchcase(module, pattern) for pattern in patterns)
