"""`dbsam::WindowedAttention`: SAM's attention within the windows of a map that is not cut up.

The pattern is `dbsam_deploy.graphs.encoder_decoder.WindowedBlock` between its LayerNorm and its
residual, once its attention is `dbsam::RelPosAttention`: padding, windows, Linear, attention,
Linear, and the map again. The Linear layers take the map as it is, and the op's own padding is what
the first of them makes of zeros, its bias. Optional: a recipe asks for it (`optional_fusions`).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from . import rel_pos_attention
from .nodes import (
    DOMAIN,
    equals,
    fused,
    map_sizes,
    parse_body,
    place,
    static_dims,
    view,
    view_dims,
)

NAME = "WindowedAttention"
STEM = "windowed_attention"
"""What a recipe calls it."""
MODULE = re.compile(r"image_encoder\.blocks\.(\d+)\.attn\.(qkv|proj)")
"""Path of a layer that takes the map instead of its windows."""

_HEAD = """
<opset_import: ["" : 18], domain: "dbsam">
WindowedAttention
<num_heads, side, scale, height, width, channels, plugin_namespace, plugin_version>
(qkv, qkv_bias, rel_pos_h, rel_pos_w) => (out) {
"""

_WINDOWS = f"""
  # Rows (down, 1, side, 1) and columns (1, across, 1, side) of the windows' tokens on the map
{map_sizes("height", "width", "channels")}
  height_rest = Add (height, last)
  width_rest = Add (width, last)
  down = Div (height_rest, side_once)
  across = Div (width_rest, side_once)
  whole_height = Mul (down, side_once)
  whole_width = Mul (across, side_once)
  row_count = Squeeze (whole_height, zero)
  column_count = Squeeze (whole_width, zero)
  row_numbers = Range (zero_scalar, row_count, one_scalar)
  column_numbers = Range (zero_scalar, column_count, one_scalar)
  row_shape = Concat <axis = 0> (down, one, side_once, one)
  column_shape = Concat <axis = 0> (one, across, one, side_once)
  map_rows = Reshape (row_numbers, row_shape)
  map_columns = Reshape (column_numbers, column_shape)

  # (B, H * W, 3 C) -> the windows' tokens (B * N, T, 3 C); those beyond the map are the bias
  below = Sub (height, one)
  beside = Sub (width, one)
  near_rows = Min (map_rows, below)
  near_columns = Min (map_columns, beside)
  near_first = Mul (near_rows, width)
  near = Add (near_first, near_columns)
  near_flat = Reshape (near, rest)
  inside_rows = Less (map_rows, height)
  inside_columns = Less (map_columns, width)
  inside = And (inside_rows, inside_columns)
  token_shape = Concat <axis = 0> (rest, one)
  inside_tokens = Reshape (inside, token_shape)
  flat_map_shape = Constant <value_ints = [0, -1]> ()
  cells = Mul (height, width)
  packed = Mul (three, channels)
  map_tokens_shape = Concat <axis = 0> (rest, cells, packed)
  map_tokens = Reshape (qkv, map_tokens_shape)
  gathered = Gather <axis = 1> (map_tokens, near_flat)
  padded = Where (inside_tokens, gathered, qkv_bias)
  windows_shape = Concat <axis = 0> (rest, tokens, packed)
  windows = Reshape (padded, windows_shape)
"""

_MAP = """
  # Back to (B, H, W, C): the place of each token of the map among those of the windows
  out_row_numbers = Range (zero_scalar, height_scalar, one_scalar)
  out_column_numbers = Range (zero_scalar, width_scalar, one_scalar)
  out_rows = Reshape (out_row_numbers, token_shape)
  window_rows = Div (out_rows, side_once)
  window_columns = Div (out_column_numbers, side_once)
  inner_rows = Mod (out_rows, side_once)
  inner_columns = Mod (out_column_numbers, side_once)
  window_first = Mul (window_rows, across)
  window = Add (window_first, window_columns)
  inner_first = Mul (inner_rows, side_once)
  inner = Add (inner_first, inner_columns)
  window_start = Mul (window, tokens)
  place = Add (window_start, inner)
  count = Mul (down, across)
  all_tokens = Mul (count, tokens)
  attended_shape = Concat <axis = 0> (rest, all_tokens, channels)
  attended_tokens = Reshape (attended, attended_shape)
  out = Gather <axis = 1> (attended_tokens, place)
}
"""


@dataclass(frozen=True)
class WindowedMap:
    """What is read from a matched graph.

    Attributes:
        height: of the map.
        width: of the map.
        channels: of a token, C.
        attention: attributes of the node that attends within windows.
    """

    height: int
    width: int
    channels: int
    attention: dict[str, Any]

    def attributes(self) -> dict[str, Any]:
        """The node's attributes; the plugin reads the map's shape from its tensor."""
        sizes = {"height": self.height, "width": self.width, "channels": self.channels}
        return {**self.attention, **sizes}


def kept_apart(quantized: Collection[str], stage_depth: int) -> int:
    """How many windowed blocks stay as they are, because a layer beside it has Q/DQ pairs.

    Args:
        quantized: paths of modules.
        stage_depth: blocks of a stage, the last of which has no windows.
    """
    blocks = {int(found[1]) for path in quantized if (found := MODULE.fullmatch(path))}
    return sum((number + 1) % stage_depth != 0 for number in blocks)


class WindowedAttentionFusion(pattern.RewriteRuleClassBase):
    """`WindowedBlock` around its attention → Linear, one node, Linear.

    Args:
        ragged: whether the windows reach beyond the map, which is then cut out again.
    """

    def __init__(self, ragged: bool) -> None:
        super().__init__()
        self.ragged = ragged

    def pattern(
        self,
        op: Any,
        x: Any,
        pads: Any,
        qkv_weight: Any,
        qkv_bias: Any,
        rel_pos_h: Any,
        rel_pos_w: Any,
        out_weight: Any,
        out_bias: Any,
        rows: Any,
        columns: Any,
    ) -> Any:
        """(B, H, W, C) → (B, H, W, C)."""
        order = [0, 1, 3, 2, 4, 5]
        padded = op.Pad(x, pads, _outputs=["padded"])
        windows = view(op, op.Transpose(view(op, padded, "split"), perm=order), "windows")
        qkv = op.Add(op.MatMul(windows, qkv_weight), qkv_bias, _outputs=["qkv"])
        attended = op.RelPosAttention(
            qkv, rel_pos_h, rel_pos_w, _domain=DOMAIN, _outputs=["attended"]
        )
        linear = op.Add(op.MatMul(attended, out_weight), out_bias, _outputs=["linear"])
        out = view(op, op.Transpose(view(op, linear, "out_split"), perm=order), "joined")
        if self.ragged:
            out = op.Slice(op.Slice(out, [0], rows, [1], [1]), [0], columns, [2], [1])
        return out

    def rewrite(self, op: Any, x: ir.Value, **parts: ir.Value) -> ir.Value | None:
        """The layers on the map and one node; None where `read_window` finds no match."""
        window = read_window(x, parts, self.ragged)
        if window is None or x.shape is None:
            return None
        *shape, channels = x.shape
        qkv, linear = parts["qkv"], parts["linear"]
        product = op.MatMul(x, parts["qkv_weight"])
        packed = op.Add(place(product, qkv, *shape, 3 * window.channels), parts["qkv_bias"])
        attended = fused(
            *(op, NAME, place(packed, qkv, *shape, 3 * window.channels)),
            *(parts["qkv_bias"], parts["rel_pos_h"], parts["rel_pos_w"]),
            **window.attributes(),
        )
        product = op.MatMul(
            place(attended, parts["attended"], *shape, channels), parts["out_weight"]
        )
        out = op.Add(place(product, linear, *shape, channels), parts["out_bias"])
        return place(out, linear, *shape, channels)


def read_window(x: ir.Value, parts: dict[str, ir.Value], ragged: bool) -> WindowedMap | None:
    """Read the sizes of a matched graph.

    Args:
        x: (B, H, W, C) map.
        parts: values by their name in the pattern.
        ragged: whether the map is cut out at the end.

    Returns:
        The sizes, or None if the graph computes something else.
    """
    node = parts["attended"].producer()
    pad = parts["padded"].producer()
    map_shape = static_dims(x)
    if node is None or pad is None or len(map_shape) != 3:
        return None
    (height, width, channels), attributes = map_shape, node.attributes
    side = attributes.get_int("side", 1)
    down, across = -(-height // side), -(-width // side)
    below, beside = down * side - height, across * side - width
    weights = (("qkv_weight", 3), ("out_weight", 1))
    biases = (("qkv_bias", 3), ("out_bias", 1))
    holds = (
        pad.attributes.get_string("mode", "constant") == "constant"
        and equals(parts["pads"], [0, 0, 0, 0, 0, below, beside, 0])
        and view_dims(parts["split"]) == (down, side, across, side, channels)
        and view_dims(parts["windows"]) == (side * side, channels)
        and view_dims(parts["out_split"]) == (down, across, side, side, channels)
        and view_dims(parts["joined"]) == (down * side, across * side, channels)
        and static_dims(parts["attended"]) == (side * side, channels)
        and all(_has_shape(parts[name], channels, n * channels) for name, n in weights)
        and all(_has_shape(parts[name], n * channels) for name, n in biases)
        and (
            equals(parts["rows"], [height]) and equals(parts["columns"], [width])
            if ragged
            else below == beside == 0
        )
    )
    kept = {
        "num_heads": attributes.get_int("num_heads", 0),
        "side": side,
        "scale": attributes.get_float("scale", 0.0),
    }
    return WindowedMap(height, width, channels, kept) if holds else None


def _has_shape(value: ir.Value, *dims: int) -> bool:
    """Whether a value is a constant of that shape."""
    return value.const_value is not None and tuple(value.const_value.shape) == dims


def rules() -> list[pattern.RewriteRule]:
    """The rewrite rules of this op."""
    return [WindowedAttentionFusion.rule(ragged) for ragged in (True, False)]


def body(groups: int = 1) -> ir.Function:
    """The op in standard ops.

    Args:
        groups: see `rel_pos_attention.body`.
    """
    steps = rel_pos_attention.steps(groups, before=_WINDOWS, qkv="windows", out="attended")
    return parse_body(_HEAD + steps + _MAP)
