"""Retypes the int8 Q/DQ pairs of a graph: to fp8 (E4M3), or to pairs on weights alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from ..core.errors import ExportError

E4M3_MAX = 448.0
INT8_MAX = 127.0

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def keep_weights_only(model: onnx.ModelProto, nodes: Collection[str] | None = None) -> None:
    """Take the pairs on activations out, in place; weights keep their DequantizeLinear.

    Args:
        model: with int8 or float8 pairs.
        nodes: names of the layers whose inputs are meant; None for all.
    """
    source = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == _QUANTIZE}
    plain = {
        n.output[0]: source[n.input[0]]
        for n in model.graph.node
        if n.op_type == _DEQUANTIZE and n.input[0] in source
    }
    for node in model.graph.node:
        if nodes is None or node.name in nodes:
            node.input[:] = [plain.get(name, name) for name in node.input]
    read = {name for node in model.graph.node for name in node.input}
    read |= {value.name for value in model.graph.output}
    for pairs in (plain, source):  # a DequantizeLinear first, then what it alone has read
        unread = pairs.keys() - read
        _replace(model.graph.node, [n for n in model.graph.node if n.output[0] not in unread])
        read = {name for node in model.graph.node for name in node.input}
    _drop_unused(model)


def to_float8(model: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Make every pair E4M3, in place: scales for ±448 instead of ±127, weights rounded anew.

    Args:
        model: with int8 pairs, of opset 19 or later.
        original: the same graph before, for its weights.

    Raises:
        ExportError: an older opset.
    """
    check_float8_opset(model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {tensor.name: tensor for tensor in original.graph.initializer}
    scales: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in (_QUANTIZE, _DEQUANTIZE):
            continue
        scale, zero = node.input[1], node.input[2]
        if scale not in scales:
            scales.add(scale)
            array = numpy_helper.to_array(tensors[scale])
            wide = (array.astype(np.float64) * (INT8_MAX / E4M3_MAX)).astype(array.dtype)
            tensors[scale].CopyFrom(numpy_helper.from_array(wide, scale))
        tensors[zero].CopyFrom(_float8(np.zeros(tuple(tensors[zero].dims)), zero))
        if node.op_type == _DEQUANTIZE and node.input[0] in tensors:
            name = node.input[0]
            values = numpy_helper.to_array(weights[name.removesuffix("_quantized")])
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            step = numpy_helper.to_array(tensors[scale]).astype(np.float64)
            shape = [1] * values.ndim
            shape[axis] = -1
            # Multiplied by a scale that was rounded, the largest value may reach just beyond.
            scaled = np.clip(values / step.reshape(shape), -E4M3_MAX, E4M3_MAX)
            tensors[name].CopyFrom(_float8(scaled, name))
    # Types of tensors between a pair are inferred anew.
    between = {n.output[0] for n in model.graph.node if n.op_type == _QUANTIZE}
    _replace(model.graph.value_info, [v for v in model.graph.value_info if v.name not in between])


def check_float8_opset(model: onnx.ModelProto) -> None:
    """Refuse a graph whose opset does not know float8.

    Raises:
        ExportError: it is older.
    """
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    if opset < 19:
        raise ExportError(
            f"fp8 needs opset 19 or later, the graph has {opset}; set it in the recipe"
        )


def keep_relus(model: onnx.ModelProto) -> None:
    """Write Relu as Max(x, 0) in front of float8 pairs, in place.

    ONNX Runtime (1.32) drops a Relu in front of QuantizeLinear if the zero point's bits are 0, the
    least value of uint8 but the middle of float8: negative values would go on.
    """
    types = {t.name: t.data_type for t in model.graph.initializer}
    scales = {n.input[0]: types[n.input[1]] for n in model.graph.node if n.op_type == _QUANTIZE}
    for node in model.graph.node:
        if node.op_type != "Relu" or node.output[0] not in scales:
            continue
        kind = onnx.helper.tensor_dtype_to_np_dtype(scales[node.output[0]])
        zero = numpy_helper.from_array(np.zeros((), kind), f"{node.output[0]}.zero")
        model.graph.initializer.append(zero)
        node.op_type = "Max"
        node.input.append(zero.name)


def _float8(values: npt.NDArray[Any], name: str) -> onnx.TensorProto:
    rounded = values.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return onnx.helper.make_tensor(
        name, onnx.TensorProto.FLOAT8E4M3FN, values.shape, rounded.tobytes(), raw=True
    )


def _replace(field: Any, items: list[Any]) -> None:
    del field[:]
    field.extend(items)


def _drop_unused(model: onnx.ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    used |= {value.name for value in model.graph.output}
    _replace(model.graph.initializer, [t for t in model.graph.initializer if t.name in used])
    produced = {name for node in model.graph.node for name in node.output}
    _replace(model.graph.value_info, [v for v in model.graph.value_info if v.name in produced])
