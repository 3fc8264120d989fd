"""`dbsam::DepthwiseConvGelu`: depthwise 3×3, bias and GELU of a feed-forward network as one op.

The pattern is `dbsam_deploy.model.blocks.MixFFN` between its Linear layers, whose tokens stay as
they are: the maps of several levels need neither be split nor joined. Optional: a recipe asks for
it (`optional_fusions`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from .nodes import (
    GELU_CONSTANTS,
    equals,
    fused,
    is_convolution,
    map_sizes,
    parse_body,
    place,
    static_dims,
    view_dims,
)

NAME = "DepthwiseConvGelu"
STEM = "depthwise_conv_gelu"
"""What a recipe calls it."""
MODULE = re.compile(r"(image_encoder\.adapter\..+\.mlp)\.dwconv\.dwconv")
"""Path of a layer within the op."""

BODY = f"""
<opset_import: ["" : 18], domain: "dbsam">
DepthwiseConvGelu <height, width, channels, plugin_namespace, plugin_version>
(x, weight, bias) => (out) {{
{GELU_CONSTANTS}
  # Maps (B * L, C, H, W)
  one = Constant <value_ints = [1]> ()
  rest = Constant <value_ints = [-1]> ()
{map_sizes("rows", "columns", "depth")}
  map_shape = Concat <axis = 0> (rest, rows, columns, depth)
  maps = Reshape (x, map_shape)
  planes = Transpose <perm = [0, 3, 1, 2]> (maps)

  filtered = Conv
    <group: int = @channels, kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [1, 1]>
    (planes, weight, bias)
  scaled = Div (filtered, root)
  error = Erf (scaled)
  sum = Add (error, unit)
  twice = Mul (filtered, sum)
  activated = Mul (twice, half)

  token_maps = Transpose <perm = [0, 2, 3, 1]> (activated)
  token_shape = Shape (x)
  out = Reshape (token_maps, token_shape)
}}
"""


@dataclass(frozen=True)
class Maps:
    """What is read from a matched graph.

    Attributes:
        tokens: (B, L·H·W, C) value, the op's input.
        weight: (C, 1, 3, 3).
        bias: (C,).
        height: H.
        width: W.
    """

    tokens: ir.Value
    weight: ir.Value
    bias: ir.Value
    height: int
    width: int

    def attributes(self, channels: int) -> dict[str, Any]:
        """The node's attributes; `channels` is the number of groups in the body's convolution."""
        return {"height": self.height, "width": self.width, "channels": channels}


def supports(channels: int) -> bool:
    """Whether the kernel runs these sizes."""
    return channels % 8 == 0 and channels > 0


def kept_apart(quantized: Collection[str]) -> int:
    """How many occurrences stay as they are, because their convolution has Q/DQ pairs."""
    return len({found[1] for path in quantized if (found := MODULE.fullmatch(path))})


class DepthwiseConvGeluFusion(pattern.RewriteRuleClassBase):
    """`MixFFN` between its Linear layers → one node.

    The pattern is its GELU; the levels before it, of any number, are read by `read_maps`. They
    become unused.
    """

    def pattern(self, op: Any, filtered: Any, root: Any, one: Any, half: Any) -> Any:
        """(B, L·H·W, C) → (B, L·H·W, C)."""
        share = op.Add(op.Erf(op.Div(filtered, root)), one)
        return op.Mul(op.Mul(filtered, share), half, _outputs=["out"])

    def rewrite(self, op: Any, filtered: ir.Value, **parts: ir.Value) -> ir.Value | None:
        """One node with the map's shape as attributes; None where `read_maps` finds no match."""
        out, maps = parts["out"], read_maps(filtered)
        holds = (
            equals(parts["root"], math.sqrt(2))
            and equals(parts["one"], 1)
            and equals(parts["half"], 0.5)
        )
        if maps is None or not holds or static_dims(out) != static_dims(maps.tokens):
            return None
        made = fused(
            *(op, NAME, maps.tokens, maps.weight, maps.bias),
            **maps.attributes(static_dims(out)[1]),
        )
        return place(made, out, *(out.shape or ()))


def read_maps(filtered: ir.Value) -> Maps | None:
    """Read what a GELU is taken of.

    Args:
        filtered: (B, L·H·W, C), the levels' convolutions one behind the other.

    Returns:
        Input, weights and shape, or None if the graph computes something else or the kernel cannot
        run it.
    """
    joined = filtered.producer()
    levels: list[ir.Value | None] = [filtered]
    if joined is not None and joined.op_type == "Concat":
        if joined.attributes.get_int("axis") != 1:
            return None
        levels = list(joined.inputs)
    found = [_read_level(level) for level in levels]
    first = found[0]
    if first is None or any(level is None or level[1:] != first[1:] for level in found):
        return None
    _, weight, bias, (channels, height, width) = first
    tokens = _whole([level[0] for level in found if level is not None], height * width)
    if tokens is None or static_dims(tokens) != (len(levels) * height * width, channels):
        return None
    return Maps(tokens, weight, bias, height, width) if supports(channels) else None


def _read_level(
    level: ir.Value | None,
) -> tuple[ir.Value, ir.Value, ir.Value, tuple[int, int, int]] | None:
    """Tokens (B, H·W, C), weight, bias and (C, H, W) of a level's convolution.

    It is Transpose(Reshape(Conv(Reshape(Transpose(tokens))))); None if the graph is another.
    """
    rows = _before(level, "Transpose", (0, 2, 1))
    filtered = _before(rows, "Reshape")
    node = None if filtered is None else filtered.producer()
    if rows is None or filtered is None or node is None or node.op_type != "Conv":
        return None
    plane, weight, bias = (*node.inputs, None)[:3]
    tokens = _before(_before(plane, "Reshape"), "Transpose", (0, 2, 1))
    if plane is None or tokens is None or weight is None or bias is None:
        return None
    dims = view_dims(plane)
    if len(dims) != 3 or bias.const_value is None:
        return None
    channels, height, width = dims
    holds = (
        static_dims(tokens) == (height * width, channels)
        and view_dims(rows) == (channels, height * width)
        and is_convolution(filtered, (channels, 1, 3, 3), padding=1, groups=channels, biased=True)
        and tuple(bias.const_value.shape) == (channels,)
    )
    return (tokens, weight, bias, (channels, height, width)) if holds else None


def _before(value: ir.Value | None, op_type: str, perm: tuple[int, ...] = ()) -> ir.Value | None:
    """First input of the node that made a value, if it is of that type with that permutation."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type or node.domain:
        return None
    return node.inputs[0] if tuple(node.attributes.get_ints("perm", ())) == perm else None


def _whole(parts: list[ir.Value], cells: int) -> ir.Value | None:
    """The tokens that parts of `cells` were split from, or the only part itself."""
    node = parts[0].producer()
    if node is None or node.op_type != "Split":
        return parts[0] if len(parts) == 1 else None
    sizes = node.inputs[1] if len(node.inputs) > 1 else None
    holds = (
        list(node.outputs) == parts
        and node.attributes.get_int("axis", 0) == 1
        and equals(sizes, [cells] * len(parts))
    )
    return node.inputs[0] if holds else None


def rules() -> list[pattern.RewriteRule]:
    """The rewrite rules of this op."""
    return [DepthwiseConvGeluFusion.rule()]


def body() -> ir.Function:
    """The op in standard ops."""
    return parse_body(BODY)
