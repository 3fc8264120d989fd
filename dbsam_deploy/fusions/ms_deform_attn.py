"""`dbsam::MsDeformAttn`: softmax, sampling locations, bilinear sampling and weighted sum as one op.

The maths is `dbsam_deploy.model.deform_attn.DeformableSampling`; the pattern is
`dbsam_deploy.graphs.encoder_decoder.BatchedSampling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from ..model.deform_attn import Shapes, reference_points
from .nodes import equals, fused, parse_body, place, static_dims, view
from .nodes import view_dims as dims

NAME = "MsDeformAttn"
MAX_HEAD_DIM, MAX_LEVELS, MAX_POINTS = 256, 8, 8

BODY = """
<opset_import: ["" : 18], domain: "dbsam">
MsDeformAttn
<num_heads, num_points, level_shapes, query_shapes, plugin_namespace, plugin_version>
(value, offsets, weights) => (out) {
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  rest = Constant <value_ints = [-1]> ()
  half = Constant <value_float = 0.5> ()
  unit = Constant <value_float = 1.0> ()
  double = Constant <value_float = 2.0> ()
  only_x = Constant <value_floats = [1.0, 0.0]> ()
  only_y = Constant <value_floats = [0.0, 1.0]> ()

  # All levels have the first one's shape, and so have all query levels.
  num_heads = Constant <value_int: int = @num_heads> ()
  num_points = Constant <value_int: int = @num_points> ()
  heads = Reshape (num_heads, one)
  points = Reshape (num_points, one)
  level_shapes = Constant <value_ints: ints = @level_shapes> ()
  query_shapes = Constant <value_ints: ints = @query_shapes> ()
  twice_levels = Shape (level_shapes)
  levels = Div (twice_levels, two)
  twice_query_levels = Shape (query_shapes)
  query_levels = Div (twice_query_levels, two)
  level = Slice (level_shapes, zero, two)
  level_height, level_width = Split <axis = 0, num_outputs = 2> (level)
  cells = Mul (level_height, level_width)

  # Reference points (Q, 2): centres of the query cells
  query_level = Slice (query_shapes, zero, two)
  query_height, query_width = Split <axis = 0, num_outputs = 2> (query_level)
  zero_scalar = Constant <value_int = 0> ()
  one_scalar = Constant <value_int = 1> ()
  height_scalar = Squeeze (query_height, zero)
  width_scalar = Squeeze (query_width, zero)
  columns = Range (zero_scalar, width_scalar, one_scalar)
  rows = Range (zero_scalar, height_scalar, one_scalar)
  columns_float = Cast <to = 1> (columns)
  rows_float = Cast <to = 1> (rows)
  columns_centre = Add (columns_float, half)
  rows_centre = Add (rows_float, half)
  width_float = Cast <to = 1> (query_width)
  height_float = Cast <to = 1> (query_height)
  x = Div (columns_centre, width_float)
  y = Div (rows_centre, height_float)
  column_shape = Constant <value_ints = [-1, 1]> ()
  row_shape = Constant <value_ints = [-1, 1, 1]> ()
  x_column = Reshape (x, column_shape)
  y_row = Reshape (y, row_shape)
  x_pair = Mul (x_column, only_x)
  y_pair = Mul (y_row, only_y)
  centre_map = Add (x_pair, y_pair)
  all_levels = Concat <axis = 0> (query_levels, query_height, query_width, two)
  centre_maps = Expand (centre_map, all_levels)
  pair_shape = Constant <value_ints = [-1, 2]> ()
  centres = Reshape (centre_maps, pair_shape)

  # Grid 2 * (centre + offset / size) - 1, (B*L*H, P, Q, 2)
  offsets_float = Cast <to = 1> (offsets)
  offset_shape = Concat <axis = 0> (zero, zero, heads, levels, points, two)
  offset_split = Reshape (offsets_float, offset_shape)
  offset_points = Transpose <perm = [0, 3, 2, 4, 1, 5]> (offset_split)
  level_size = Concat <axis = 0> (level_width, level_height)
  size = Cast <to = 1> (level_size)
  centre_zeros = Sub (centres, centres)
  step_once = Div (double, size)
  step = Add (centre_zeros, step_once)
  double_centres = Mul (centres, double)
  start = Sub (double_centres, unit)
  grid_steps = Mul (offset_points, step)
  grid_points = Add (grid_steps, start)
  grid_flat = Flatten <axis = 3> (grid_points)
  grid_shape = Concat <axis = 0> (zero, points, rest, two)
  grid = Reshape (grid_flat, grid_shape)

  # Softmax over levels and points, (B*L*H, 1, P, Q)
  weights_float = Cast <to = 1> (weights)
  logit_shape = Concat <axis = 0> (zero, zero, heads, rest)
  logits = Reshape (weights_float, logit_shape)
  shares = Softmax <axis = -1> (logits)
  share_shape = Concat <axis = 0> (zero, zero, heads, levels, points)
  share_split = Reshape (shares, share_shape)
  share_points = Transpose <perm = [0, 3, 2, 4, 1]> (share_split)
  share_flat = Flatten <axis = 3> (share_points)
  plane_share_shape = Concat <axis = 0> (zero, one, points, rest)
  plane_shares = Reshape (share_flat, plane_share_shape)

  # Value planes (B*L*H, D, height, width)
  value_float = Cast <to = 1> (value)
  value_shape = Concat <axis = 0> (zero, levels, cells, heads, rest)
  value_split = Reshape (value_float, value_shape)
  value_planes = Transpose <perm = [0, 1, 3, 4, 2]> (value_split)
  value_flat = Flatten <axis = 3> (value_planes)
  plane_shape = Concat <axis = 0> (zero, rest, level)
  planes = Reshape (value_flat, plane_shape)

  # Samples (B*L*H, D, P, Q), summed over points, then over levels
  sampled = GridSample <mode = "bilinear", padding_mode = "zeros", align_corners = 0>
    (planes, grid)
  shared = Mul (sampled, plane_shares)
  level_sums = ReduceSum <keepdims = 0> (shared, two)
  level_axes = Constant <value_ints = [1, 2]> ()
  level_sums_wide = Unsqueeze (level_sums, level_axes)
  sum_shape = Concat <axis = 0> (rest, levels, heads, zero, zero)
  level_sums_split = Reshape (level_sums_wide, sum_shape)
  summed = ReduceSum <keepdims = 0> (level_sums_split, one)
  tokens = Transpose <perm = [0, 3, 1, 2]> (summed)
  token_shape = Constant <value_ints = [0, 0, -1]> ()
  joined = Reshape (tokens, token_shape)
  out = CastLike (joined, value)
}
"""


@dataclass(frozen=True)
class Sampling:
    """Sizes read from a matched graph.

    Attributes:
        heads: attention heads.
        points: sampling points of each head and level.
        levels: height and width of each value level.
        queries: height and width of each query level.
    """

    heads: int
    points: int
    levels: Shapes
    queries: Shapes

    def attributes(self) -> dict[str, Any]:
        """The node's attributes."""
        return {
            "num_heads": self.heads,
            "num_points": self.points,
            "level_shapes": [side for shape in self.levels for side in shape],
            "query_shapes": [side for shape in self.queries for side in shape],
        }


def supports(head_dim: int, levels: int, points: int) -> bool:
    """Whether the kernel runs these sizes."""
    return (
        head_dim % 8 == 0
        and 0 < head_dim <= MAX_HEAD_DIM
        and 0 < levels <= MAX_LEVELS
        and 0 < points <= MAX_POINTS
    )


class MsDeformAttnFusion(pattern.RewriteRuleClassBase):
    """`BatchedSampling` → one node.

    Args:
        cast: match the sampling of a half-precision graph, with its casts to float32 and back.
    """

    def __init__(self, *, cast: bool) -> None:
        super().__init__(name=NAME)
        self.cast = cast

    def pattern(
        self,
        op: Any,
        value: Any,
        offsets: Any,
        weights: Any,
        size: Any,
        centres: Any,
        two: Any,
        one: Any,
        dtype: Any,
    ) -> Any:
        """(B, V, H·D), (B, Q, H·L·P·2), (B, Q, H·L·P) → (B, Q, H·D)."""

        def wide(x: Any) -> Any:
            return op.Cast(x, to=ir.DataType.FLOAT.value) if self.cast else x

        location = op.Add(centres, op.Div(wide(view(op, offsets, "offset_split")), size))
        grid = op.Sub(op.Mul(location, two), one)
        grid = view(op, op.Transpose(grid, perm=[0, 3, 2, 4, 1, 5]), "grid")
        shares = op.Softmax(view(op, wide(view(op, weights, "weight_split")), "logits"), axis=-1)
        shares = op.Transpose(view(op, shares, "share_split"), perm=[0, 3, 2, 4, 1])
        planes = view(op, wide(view(op, value, "value_split")), "value_levels")
        planes = view(op, op.Transpose(planes, perm=[0, 1, 3, 4, 2]), "planes")
        sampled = op.GridSample(
            planes, grid, mode="bilinear", padding_mode="zeros", align_corners=0
        )
        summed = op.ReduceSum(op.Mul(sampled, view(op, shares, "shares")), [2], keepdims=0)
        summed = op.ReduceSum(view(op, summed, "level_sums"), [1], keepdims=0)
        if not self.cast:
            return op.Transpose(summed, perm=[0, 2, 1], _outputs=["out"])
        return op.Cast(op.Transpose(summed, perm=[0, 2, 1]), to=dtype, _outputs=["out"])

    def rewrite(
        self, op: Any, value: ir.Value, offsets: ir.Value, weights: ir.Value, **parts: Any
    ) -> ir.Value | None:
        """One node with the sizes as attributes; None where `read_sampling` finds no match."""
        inputs = {"value": value, "offsets": offsets, "weights": weights}
        sampling = read_sampling({**inputs, **parts})
        if sampling is None:
            return None
        out = fused(op, NAME, *inputs.values(), **sampling.attributes())
        return place(out, parts["out"], *parts["out"].shape)


def read_sampling(parts: dict[str, Any]) -> Sampling | None:
    """Read the sizes of a matched graph.

    Args:
        parts: values by their name in the pattern.

    Returns:
        The sizes, or None if the graph computes something else or the kernel cannot run it.
    """
    value, offsets, weights = (parts[name] for name in ("value", "offsets", "weights"))
    split, planes = dims(parts["offset_split"]), dims(parts["planes"])
    if len(split) != 5 or len(planes) != 3:
        return None
    (queries, heads, levels, points, _), (depth, height, width) = split, planes
    cells, samples = height * width, levels * points
    shapes = ((height, width),) * levels
    query_shapes = _query_shapes(parts["centres"], queries)
    holds = (
        static_dims(value) == (levels * cells, heads * depth)
        and static_dims(offsets) == (queries, heads * samples * 2)
        and static_dims(weights) == (queries, heads * samples)
        and static_dims(parts["out"]) == (queries, heads * depth)
        and split == (queries, heads, levels, points, 2)
        and dims(parts["grid"]) == (points, queries, 2)
        and dims(parts["weight_split"]) == (queries, heads, levels, points)
        and dims(parts["logits"]) == (queries, heads, samples)
        and dims(parts["share_split"]) == (queries, heads, levels, points)
        and dims(parts["shares"]) == (1, points, queries)
        and dims(parts["value_split"]) == (levels * cells, heads, depth)
        and dims(parts["value_levels"]) == (levels, cells, heads, depth)
        and dims(parts["level_sums"]) == (levels, heads * depth, queries)
        and equals(parts["size"], [width, height])
        and equals(parts["two"], 2)
        and equals(parts["one"], 1)
        and value.dtype == offsets.dtype == weights.dtype
        and value.dtype == (parts["dtype"].as_int() if parts["dtype"] else ir.DataType.FLOAT)
        and query_shapes != ()
        and supports(depth, levels, points)
    )
    return Sampling(heads, points, shapes, query_shapes) if holds else None


def _query_shapes(centres: ir.Value, queries: int) -> Shapes:
    """Shapes of the query levels whose cells' centres these are; () if there are none."""
    if centres.const_value is None or centres.const_value.size != queries * 2:
        return ()
    x, y = centres.const_value.numpy().reshape(-1, 2)[0].tolist()
    if not (0 < x <= 0.5 and 0 < y <= 0.5):
        return ()
    height, width = round(0.5 / y), round(0.5 / x)
    shapes = ((height, width),) * (queries // (height * width))
    expected = reference_points(shapes)[:, :, None, None].numpy() if shapes else ()
    return shapes if equals(centres, expected) else ()


def rules() -> list[pattern.RewriteRule]:
    """The rewrite rules of this op."""
    return [MsDeformAttnFusion.rule(cast=True), MsDeformAttnFusion.rule(cast=False)]


def body() -> ir.Function:
    """The op in standard ops."""
    return parse_body(BODY)
