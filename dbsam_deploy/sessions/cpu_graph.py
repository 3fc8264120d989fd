"""A quantised graph → the operators that ONNX Runtime's CPU kernels are fast in.

The published file has symmetric int8 Q/DQ pairs, which every engine builder takes. On x86 ONNX
Runtime multiplies unsigned activations by signed weights, and turns only some of the pairs into
that form: none whose quantised tensor has several readers, and no bias goes along. Here each
quantised Linear layer becomes one `com.microsoft.MatMulIntegerToFloat` with its bias, which gives
the same numbers.

ONNX Runtime has no convolution with int8 inputs and a float32 output. Convolutions read the tensor
before its pair, and their dequantised weights: closer to float32 than the artefact, and without two
passes over the tensor. Linear layers of which only the weights are quantised get their weights
dequantised as well: ONNX Runtime would round their inputs, block by block, which nobody measured.
`benchmarks/compare_cpu.py` measures each step.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from ..files.onnx_data import OnnxContent
from ..files.onnx_files import read_content

MICROSOFT = "com.microsoft"
UNSIGNED_ZERO = 128
"""Zero point of uint8 values that stand for int8 values with zero point 0."""

WHOLE = 1e-3
"""How far from a whole number of steps a shift may be by its rounding to float32."""

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def is_quantized(model: onnx.ModelProto) -> bool:
    """Whether a graph has activations or weights in eight bits."""
    return any(node.op_type == _DEQUANTIZE for node in model.graph.node)


@dataclass(frozen=True)
class _Pair:
    """An activation's Q/DQ pair: the tensor before it, its scale and the quantised tensor."""

    source: str
    scale: str
    quantized: str


@dataclass
class _Graph:
    """A graph's nodes by what they make, with what the rewrite adds."""

    model: onnx.ModelProto
    makers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    readers: Counter[str] = field(default_factory=Counter)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    added: dict[str, onnx.TensorProto] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.makers = {name: node for node in graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.readers = Counter(name for node in graph.node for name in node.input)
        self.readers.update(value.name for value in graph.output)

    def array(self, name: str) -> npt.NDArray[Any]:
        return numpy_helper.to_array(self.constants[name])

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        if name not in self.added:
            self.added[name] = numpy_helper.from_array(value, name)
        return name

    def pair(self, name: str) -> _Pair | None:
        """The pair that makes `name`, if it is per tensor, symmetric and int8."""
        dequantize = self.makers.get(name)
        if dequantize is None or dequantize.op_type != _DEQUANTIZE:
            return None
        quantize = self.makers.get(dequantize.input[0])
        if quantize is None or quantize.op_type != _QUANTIZE:
            return None
        if not self._is_symmetric(quantize) or self.array(quantize.input[1]).size != 1:
            return None
        return _Pair(quantize.input[0], quantize.input[1], quantize.output[0])

    def weight(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that makes `name` of symmetric int8 constants."""
        node = self.makers.get(name)
        if node is None or node.op_type != _DEQUANTIZE or node.input[0] not in self.constants:
            return None
        return node if self._is_symmetric(node) else None

    def _is_symmetric(self, node: onnx.NodeProto) -> bool:
        if len(node.input) < 3 or not {node.input[1], node.input[2]} <= self.constants.keys():
            return False
        zero = self.constants[node.input[2]]
        return zero.data_type == onnx.TensorProto.INT8 and not numpy_helper.to_array(zero).any()


def read_cpu_graph(content: OnnxContent) -> OnnxContent:
    """The content of a published graph's file, rewritten for ONNX Runtime's CPU provider."""
    return OnnxContent(cpu_graph(read_content(content)).SerializeToString())


def cpu_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite a graph with int8 Q/DQ pairs for ONNX Runtime on x86; other graphs come back as is.

    Args:
        model: a published graph, which is changed.

    Returns:
        The rewritten model.
    """
    if not is_quantized(model):
        return model
    graph = _Graph(model)
    biases = _biases(graph)
    for node in model.graph.node:
        if node.op_type == "MatMul" and _rewrite_linear(graph, node, biases.get(node.output[0])):
            continue
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            _dequantize_weight(graph, node)
        if node.output[0] in graph.renamed:
            continue  # a bias that went into its layer
        graph.nodes.append(node)
    _replace(graph)
    return model


def _biases(graph: _Graph) -> dict[str, onnx.NodeProto]:
    """Output of a MatMul → the Add that is its only reader and adds a constant vector."""
    found = {}
    for node in graph.model.graph.node:
        if node.op_type != "Add":
            continue
        for product, bias in (node.input, reversed(node.input)):
            maker = graph.makers.get(product)
            if (
                maker is not None
                and maker.op_type == "MatMul"
                and bias in graph.constants
                and len(graph.constants[bias].dims) == 1
                and graph.readers[product] == 1
            ):
                found[product] = node
    return found


def _rewrite_linear(graph: _Graph, node: onnx.NodeProto, add: onnx.NodeProto | None) -> bool:
    """One quantised Linear layer; False if this MatMul is none."""
    pair, weight = graph.pair(node.input[0]), graph.weight(node.input[1])
    if pair is None or weight is None:
        return False
    values, scale = graph.array(weight.input[0]), graph.array(weight.input[1])
    axis = next((a.i for a in weight.attribute if a.name == "axis"), 1)
    if values.ndim != 2 or (scale.size > 1 and axis not in (1, -1)):
        return False
    zero = graph.constant("cpu_graph.zero", np.array(UNSIGNED_ZERO, np.uint8))
    unsigned = f"{pair.quantized}.unsigned"
    if unsigned not in graph.makers:
        source, middle = _one_sided(graph, pair)
        inputs = [source, pair.scale, graph.constant(f"cpu_graph.zero.{middle}", middle)]
        quantize = helper.make_node(_QUANTIZE, inputs, [unsigned])
        graph.makers[unsigned] = quantize
        graph.nodes.append(quantize)
    inputs = [unsigned, weight.input[0], pair.scale, weight.input[1], zero, weight.input[2]]
    output = node.output[0]
    if add is not None:
        inputs.append(add.input[1] if add.input[0] == output else add.input[0])
        output = add.output[0]
        graph.renamed[output] = node.output[0]
    graph.nodes.append(
        helper.make_node("MatMulIntegerToFloat", inputs, [output], name=node.name, domain=MICROSOFT)
    )
    return True


def _one_sided(graph: _Graph, pair: _Pair) -> tuple[str, npt.NDArray[np.uint8]]:
    """What is quantised, and its zero point: a shift by whole steps (`one_sided`) goes into it."""
    zero, add = UNSIGNED_ZERO, graph.makers.get(pair.source)
    if add is not None and add.op_type == "Add" and add.input[1] in graph.constants:
        shift = graph.array(add.input[1])
        if shift.size == 1:
            steps = shift.item() / graph.array(pair.scale).item()
            place = zero + round(steps)
            if abs(steps - round(steps)) < WHOLE and 0 <= place <= 255:
                return add.input[0], np.array(place, np.uint8)
    return pair.source, np.array(zero, np.uint8)


def _dequantize_weight(graph: _Graph, node: onnx.NodeProto) -> None:
    """A layer with float weights and the input from before its pair, in place."""
    pair, weight = graph.pair(node.input[0]), graph.weight(node.input[1])
    maker = graph.makers.get(node.input[0])
    quantized = maker is not None and maker.op_type == _DEQUANTIZE
    if weight is None or (quantized and node.op_type != "Conv"):
        return
    values, scale = graph.array(weight.input[0]), graph.array(weight.input[1])
    shape = [1] * values.ndim
    if scale.size > 1:
        shape[next((a.i for a in weight.attribute if a.name == "axis"), 1)] = -1
    wide = values.astype(scale.dtype) * scale.reshape(shape)
    node.input[1] = graph.constant(f"{node.input[1]}.dequantized", wide)
    if pair is not None:
        node.input[0] = pair.source


def _replace(graph: _Graph) -> None:
    """Put the new nodes in, without those and the constants that nothing reads any more."""
    used = {value.name for value in graph.model.graph.output}
    kept = []
    for node in reversed(graph.nodes):
        if used & set(node.output):
            used |= set(node.input)
            kept.append(node)
    body = graph.model.graph
    del body.node[:]
    body.node.extend(reversed(kept))
    constants = [*body.initializer, *graph.added.values()]
    kept_constants = [tensor for tensor in constants if tensor.name in used]
    del body.initializer[:]
    body.initializer.extend(kept_constants)
    if not any(opset.domain == MICROSOFT for opset in graph.model.opset_import):
        graph.model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
