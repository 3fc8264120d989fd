"""What the fusions share: reading constants of a matched graph, and making nodes of our domain."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from ..files.onnx_files import SCOPES

DOMAIN, VERSION = "dbsam", 1
"""Domain of the fused ops and its opset version."""

PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
"""Attributes by which TensorRT's parser finds the plugin instead of inlining the function body."""

GELU_CONSTANTS = """\
  root_float = Constant <value_float = 1.4142135623730951> ()
  unit_float = Constant <value_float = 1.0> ()
  half_float = Constant <value_float = 0.5> ()
  root = CastLike (root_float, x)
  unit = CastLike (unit_float, x)
  half = CastLike (half_float, x)"""
"""Steps of a body that make GELU's constants, in the dtype of its input `x`."""


def map_sizes(height: str, width: str, channels: str) -> str:
    """Steps of a body that read a map's sizes from attributes, as scalars and in one axis.

    Args:
        height: name of the height in one axis; the scalar is `height_scalar`.
        width: of the width, likewise.
        channels: of the channels, likewise.
    """
    return f"""\
  height_scalar = Constant <value_int: int = @height> ()
  width_scalar = Constant <value_int: int = @width> ()
  channels_scalar = Constant <value_int: int = @channels> ()
  {height} = Reshape (height_scalar, one)
  {width} = Reshape (width_scalar, one)
  {channels} = Reshape (channels_scalar, one)"""


def parse_body(text: str) -> ir.Function:
    """An op's function body, written in ONNX's text format with attribute references."""
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def fused(op: Any, name: str, *inputs: ir.Value, outputs: int = 1, **attributes: Any) -> Any:
    """One of our nodes in place of a match, which TensorRT's parser takes for its plugin.

    Args:
        op: makes nodes, as a rewrite gets it.
        name: of the op.
        inputs: of the node.
        outputs: how many it has.
        attributes: of the node, without `PLUGIN`.
    """
    make = getattr(op, name)
    return make(*inputs, _domain=DOMAIN, _version=VERSION, _outputs=outputs, **attributes, **PLUGIN)


def equals(value: ir.Value | None, expected: npt.ArrayLike) -> bool:
    """Whether `value` is a constant of exactly this shape and content, rounded to its own dtype."""
    if value is None or value.const_value is None:
        return False
    found = value.const_value.numpy()
    return np.array_equal(found, np.asarray(expected).astype(found.dtype))


def view(op: Any, x: Any, name: str) -> Any:
    """A Reshape of a pattern, to any shape, whose output has this name; see `view_dims`."""
    return op.Reshape(x, _allow_other_inputs=True, _outputs=[name])


def view_dims(reshaped: ir.Value) -> tuple[int, ...]:
    """Dimensions behind the first one of a Reshape with a constant target.

    Args:
        reshaped: a Reshape's output.

    Returns:
        The dimensions, all positive, if the first one is copied or left to the rest; else ().
    """
    node = reshaped.producer()
    target = None if node is None else node.inputs[1]
    if node is None or target is None or target.const_value is None:
        return ()
    first, *others = (int(d) for d in target.const_value.numpy())
    copied = first == 0 and not node.attributes.get_int("allowzero", 0)
    return tuple(others) if (copied or first == -1) and all(d > 0 for d in others) else ()


def static_dims(value: ir.Value) -> tuple[int, ...]:
    """Dimensions behind the first one of a value; () unless all of them are known numbers."""
    dims = () if value.shape is None else tuple(value.shape)[1:]
    known = tuple(d for d in dims if isinstance(d, int))
    return known if len(known) == len(dims) else ()


def is_convolution(
    value: ir.Value,
    shape: tuple[int, ...],
    *,
    padding: int = 0,
    groups: int = 1,
    biased: bool = False,
) -> bool:
    """Whether a Conv's output is that of a plain 2-D convolution.

    Args:
        value: the output.
        shape: (out, in / groups, height, width) of the constant weight.
        padding: zeros on each side.
        groups: of the channels.
        biased: whether it may have a bias that is not zero.
    """
    node = value.producer()
    weight = None if node is None else node.inputs[1]
    if node is None or weight is None or weight.const_value is None:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    given = node.attributes
    return (
        tuple(weight.const_value.shape) == shape
        and (biased or bias is None or equals(bias, np.zeros(shape[0])))
        and given.get_int("group", 1) == groups
        and given.get_string("auto_pad", "NOTSET") == "NOTSET"
        and tuple(given.get_ints("kernel_shape", shape[2:])) == shape[2:]
        and tuple(given.get_ints("pads", [0] * 4)) == (padding,) * 4
        and tuple(given.get_ints("strides", [1, 1])) == (1, 1)
        and tuple(given.get_ints("dilations", [1, 1])) == (1, 1)
    )


def module_of(value: ir.Value) -> list[str]:
    """Paths of the modules that a value was computed in, outermost ("") first."""
    node = value.producer()
    scopes = "['']" if node is None else node.metadata_props.get(SCOPES, "['']")
    return [str(scope) for scope in ast.literal_eval(scopes)][:-1]


def name_for(value: ir.Value, what: str) -> str:
    """Name of a new initializer that belongs to the computation of `value`; its module first."""
    return ".".join((*module_of(value)[-1:], str(value.name), what))


def place(value: ir.Value, where: ir.Value, *dims: int | ir.SymbolicDim) -> ir.Value:
    """Give a new node the modules of the value that it helps to replace, and its output a type.

    Args:
        value: the new node's output.
        where: value of the matched graph, of the same dtype.
        dims: shape of `value`.
    """
    node = value.producer()
    if node is not None:
        node.metadata_props[SCOPES] = repr([*module_of(where), node.op_type])
    value.shape, value.type = ir.Shape(dims), where.type
    return value
