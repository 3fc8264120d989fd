"""`dbsam::RelPosAttention`: SAM's attention with decomposed relative positions as one op.

From the packed output of the qkv Linear to the input of the output Linear; the tables of relative
positions stay compact. The pattern is `dbsam_deploy.graphs.encoder_decoder.RelPosAttention`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript.rewriter import pattern

from .nodes import (
    fused,
    name_for,
    parse_body,
    place,
    static_dims,
    view,
)
from .nodes import view_dims as dims

NAME = "RelPosAttention"
HEAD_DIM, MAX_SIDE = 64, 64

GROUP_BYTES = 128 << 20
"""Most that the scores of one image have at once in float32, which a CPU takes for float16 too."""

_HEAD = """
<opset_import: ["" : 18], domain: "dbsam">
RelPosAttention <num_heads, side, scale, plugin_namespace, plugin_version>
(qkv, rel_pos_h, rel_pos_w) => (out) {
"""

_TABLES = """
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  three = Constant <value_ints = [3]> ()
  rest = Constant <value_ints = [-1]> ()
  num_heads = Constant <value_int: int = @num_heads> ()
  heads = Reshape (num_heads, one)
  side_scalar = Constant <value_int: int = @side> ()
  side_once = Reshape (side_scalar, one)
  tokens = Mul (side_once, side_once)

  # Tables (side, D, side): row i holds the embedding of every key position relative to query i
  zero_scalar = Constant <value_int = 0> ()
  one_scalar = Constant <value_int = 1> ()
  positions = Range (zero_scalar, side_scalar, one_scalar)
  query_positions = Unsqueeze (positions, one)
  key_positions = Unsqueeze (positions, zero)
  differences = Sub (query_positions, key_positions)
  last = Sub (side_scalar, one_scalar)
  rows = Add (differences, last)
  gathered_h = Gather <axis = 0> (rel_pos_h, rows)
  gathered_w = Gather <axis = 0> (rel_pos_w, rows)
  table_h = Transpose <perm = [0, 2, 1]> (gathered_h)
  table_w = Transpose <perm = [0, 2, 1]> (gathered_w)
"""

_ATTENTION = """
  # (N, T, 3, H, D) -> q, k, v (N, H, T, D), H being the heads of a group
%(split)s

  # The bias uses the unscaled query, as in SAM.
  grid_shape = Concat <axis = 0> (zero, zero, side_once, side_once, rest)
  bias_h_shape = Concat <axis = 0> (zero, zero, tokens, side_once, one)
  bias_w_shape = Concat <axis = 0> (zero, zero, tokens, one, side_once)
  scale_float = Constant <value_float: float = @scale> ()
  scale = CastLike (scale_float, %(qkv)s)
  map_shape = Concat <axis = 0> (zero, zero, zero, side_once, side_once)
  flat_shape = Constant <value_ints = [0, 0, 0, -1]> ()
  joined_shape = Constant <value_ints = [0, 0, -1]> ()
%(groups)s
"""

_SPLIT = """
  split_parts = Constant <value_ints = [%(parts)d]> ()
  groups = Constant <value_ints = [%(groups)d]> ()
  split_heads = Div (heads, groups)
  qkv_shape = Concat <axis = 0> (zero, zero, split_parts, split_heads, rest)
  qkv_split = Reshape (%(qkv)s, qkv_shape)
  parts = Transpose <perm = [2, 0, 3, 1, 4]> (qkv_split)
  %(names)s = Split <axis = 0, num_outputs = %(parts)d> (parts)
"""

_GROUP = """
  q@ = Squeeze (q_part@, zero)
  k@ = Squeeze (k_part@, zero)
  v@ = Squeeze (v_part@, zero)
  grid@ = Reshape (q@, grid_shape)
  bias_h@ = MatMul (grid@, table_h)
  grid_turned@ = Transpose <perm = [0, 1, 3, 2, 4]> (grid@)
  bias_w_turned@ = MatMul (grid_turned@, table_w)
  bias_w@ = Transpose <perm = [0, 1, 3, 2, 4]> (bias_w_turned@)
  bias_rows@ = Reshape (bias_h@, bias_h_shape)
  bias_columns@ = Reshape (bias_w@, bias_w_shape)
  scaled@ = Mul (q@, scale)
  keys@ = Transpose <perm = [0, 1, 3, 2]> (k@)
  products@ = MatMul (scaled@, keys@)
  product_maps@ = Reshape (products@, map_shape)
  with_rows@ = Add (product_maps@, bias_rows@)
  with_columns@ = Add (with_rows@, bias_columns@)
  scores@ = Reshape (with_columns@, flat_shape)
  shares@ = Softmax <axis = -1> (scores@)
  summed@ = MatMul (shares@, v@)
  by_token@ = Transpose <perm = [0, 2, 1, 3]> (summed@)
  joined@ = Reshape (by_token@, joined_shape)
"""


@dataclass(frozen=True)
class FoundAttention:
    """Sizes and compact tables (2·side - 1, D) read from a matched graph."""

    heads: int
    side: int
    scale: float
    rel_pos_h: npt.NDArray[Any]
    rel_pos_w: npt.NDArray[Any]

    def attributes(self) -> dict[str, Any]:
        """The node's attributes."""
        return {"num_heads": self.heads, "side": self.side, "scale": self.scale}


def supports(head_dim: int, side: int) -> bool:
    """Whether the kernel runs these sizes."""
    return head_dim == HEAD_DIM and 0 < side <= MAX_SIDE


class RelPosAttentionFusion(pattern.RewriteRuleClassBase):
    """`graphs.RelPosAttention` between its two Linear layers → one node."""

    def pattern(self, op: Any, qkv: Any, table_h: Any, table_w: Any, scale: Any) -> Any:
        """(N, T, 3·H·D) → (N, T, H·D)."""
        packed = op.Transpose(view(op, qkv, "qkv_split"), perm=[2, 0, 3, 1, 4])
        q, k, v = (
            view(op, op.Squeeze(op.Slice(packed, [part], [part + 1], [0]), [0]), name)
            for part, name in enumerate("qkv")
        )
        grid = view(op, q, "grid")
        bias_h = op.MatMul(grid, table_h)
        bias_w = op.MatMul(op.Transpose(grid, perm=[0, 2, 1, 3]), table_w)
        bias_w = op.Transpose(bias_w, perm=[0, 2, 1, 3])
        scores = op.MatMul(op.Mul(q, scale), op.Transpose(k, perm=[0, 2, 1]))
        scores = op.Add(view(op, scores, "score_maps"), view(op, bias_h, "bias_rows"))
        scores = op.Add(scores, view(op, bias_w, "bias_columns"))
        out = op.MatMul(op.Softmax(view(op, scores, "scores"), axis=-1), v)
        out = op.Transpose(view(op, out, "out_split"), perm=[0, 2, 1, 3])
        return view(op, out, "out")

    def rewrite(self, op: Any, qkv: ir.Value, **parts: Any) -> ir.Value | None:
        """One node with compact tables; None where `read_attention` finds no match."""
        attention, out = read_attention({"qkv": qkv, **parts}), parts["out"]
        if attention is None:
            return None
        tables = [
            op.initializer(ir.tensor(table), name_for(out, name))
            for name, table in (
                ("rel_pos_h", attention.rel_pos_h),
                ("rel_pos_w", attention.rel_pos_w),
            )
        ]
        made = fused(op, NAME, qkv, *tables, **attention.attributes())
        return place(made, out, *out.shape)


def read_attention(parts: dict[str, Any]) -> FoundAttention | None:
    """Read sizes and tables of a matched graph.

    Args:
        parts: values by their name in the pattern.

    Returns:
        The sizes, or None if the graph computes something else or the kernel cannot run it.
    """
    split, grid = dims(parts["qkv_split"]), dims(parts["grid"])
    if len(split) != 4 or len(grid) != 3:
        return None
    (tokens, _, heads, depth), side = split, grid[0]
    rel_pos_h, rel_pos_w = (_compact(parts[f"table_{axis}"], side, depth) for axis in "hw")
    scale = parts["scale"].const_value
    holds = (
        static_dims(parts["qkv"]) == (tokens, 3 * heads * depth)
        and tokens == side * side
        and split == (tokens, 3, heads, depth)
        and grid == (side, side, depth)
        and all(dims(parts[name]) == (tokens, depth) for name in "qkv")
        and dims(parts["score_maps"]) == (tokens, side, side)
        and dims(parts["bias_rows"]) == (tokens, side, 1)
        and dims(parts["bias_columns"]) == (tokens, 1, side)
        and dims(parts["scores"]) == (tokens, tokens)
        and dims(parts["out_split"]) == (heads, tokens, depth)
        and dims(parts["out"]) == static_dims(parts["out"]) == (tokens, heads * depth)
        and scale is not None
        and scale.size == 1
        and supports(depth, side)
    )
    if not holds or rel_pos_h is None or rel_pos_w is None:
        return None
    return FoundAttention(heads, side, float(scale.numpy().item()), rel_pos_h, rel_pos_w)


def _compact(table: ir.Value, side: int, depth: int) -> npt.NDArray[Any] | None:
    """(2·side - 1, D) embeddings of the distances in a table, None if it has others.

    Args:
        table: (side, D, side), [i, :, j] for query position i and key position j.
        side: positions.
        depth: D.
    """
    if table.const_value is None or tuple(table.const_value.shape) != (side, depth, side):
        return None
    gathered = table.const_value.numpy().transpose(0, 2, 1)
    # Distances -(side - 1) … 0 stand in the first row from right to left, 1 … in the first column.
    compact = np.concatenate((gathered[0, ::-1], gathered[1:, 0]))
    positions = np.arange(side)
    rows = positions[:, None] - positions[None, :] + side - 1
    return compact if np.array_equal(compact[rows], gathered) else None


def rules() -> list[pattern.RewriteRule]:
    """The rewrite rules of this op."""
    return [RelPosAttentionFusion.rule()]


def body(groups: int = 1) -> ir.Function:
    """The op in standard ops.

    Args:
        groups: parts in which the heads are taken, one after the other; see `head_groups`.
    """
    return parse_body(_HEAD + steps(groups) + "}")


def steps(groups: int, *, before: str = "", qkv: str = "qkv", out: str = "out") -> str:
    """The op's body from the constants on, in ONNX's text format.

    Args:
        groups: see `body`.
        before: steps that make `qkv` from the inputs; they find the constants above them.
        qkv: name of the packed tokens.
        out: name of the result.
    """
    names = [f"_{i}" for i in range(groups)]
    parts = [f"{part}_part{name}" for part in "qkv" for name in names]
    heads = "".join(_GROUP.replace("@", name) for name in names)
    if groups == 1:
        heads = heads.replace("joined_0 =", f"{out} =")
    else:
        joined = ", ".join(f"joined{name}" for name in names)
        heads += f"  {out} = Concat <axis = 2> ({joined})"
    split = _SPLIT % {"parts": len(parts), "groups": groups, "names": ", ".join(parts), "qkv": qkv}
    return _TABLES + before + _ATTENTION % {"split": split, "groups": heads, "qkv": qkv}


def groups_of(nodes: Iterable[ir.Node]) -> int:
    """`head_groups` of fused nodes, which share a body: of the one with the most scores."""
    sizes = ((node.attributes[name].as_int() for name in ("num_heads", "side")) for node in nodes)
    return max((head_groups(*pair) for pair in sizes), default=1)


def head_groups(heads: int, side: int) -> int:
    """Into how many equal parts heads are divided: the fewest that fit into `GROUP_BYTES`.

    Every head for itself, where even one does not fit. In float32 the results are the same bits.

    Args:
        heads: of an attention.
        side: height and width of its window.
    """
    counts = (n for n in range(1, heads + 1) if heads % n == 0)
    return next((n for n in counts if heads // n * side**4 * 4 <= GROUP_BYTES), heads)
