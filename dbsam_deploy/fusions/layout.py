"""Transposes between maps (B, C, H, W) and tokens that meet and cancel.

The fused ops work on tokens, as the blocks before and after them do; what is left between two of
them is a detour over the map layout.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern
from onnxscript.rewriter.rules.common import transpose_transpose_rule

from .nodes import name_for, place, static_dims, view_dims


class MapToTokens(pattern.RewriteRuleClassBase):
    """(B, H, W, C) → (B, C, H, W) → (B, C, H·W) → (B, H·W, C): one Reshape."""

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)  # the map may have other uses

    def pattern(self, op: Any, x: Any) -> Any:
        """The detour."""
        rows = op.Reshape(
            op.Transpose(x, perm=[0, 3, 1, 2]), _allow_other_inputs=True, _outputs=["rows"]
        )
        return op.Transpose(rows, perm=[0, 2, 1], _outputs=["out"])

    def rewrite(self, op: Any, x: ir.Value, rows: ir.Value, out: ir.Value) -> ir.Value | None:
        """One Reshape; None if the one in the middle is another."""
        *sides, channels = static_dims(x) or (0,)
        cells = math.prod(sides)
        if len(sides) != 2 or view_dims(rows) != (channels, cells):
            return None
        return _reshape(op, x, out, cells, channels)


class TokensToMap(pattern.RewriteRuleClassBase):
    """(B, H·W, C) → (B, C, H·W) → (B, C, H, W) → (B, H, W, C): one Reshape."""

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, x: Any) -> Any:
        """The detour."""
        planes = op.Reshape(
            op.Transpose(x, perm=[0, 2, 1]), _allow_other_inputs=True, _outputs=["planes"]
        )
        return op.Transpose(planes, perm=[0, 2, 3, 1], _outputs=["out"])

    def rewrite(self, op: Any, x: ir.Value, planes: ir.Value, out: ir.Value) -> ir.Value | None:
        """One Reshape; None if the one in the middle is another."""
        channels, *sides = view_dims(planes) or (0,)
        if len(sides) != 2 or static_dims(x) != (math.prod(sides), channels):
            return None
        return _reshape(op, x, out, *sides, channels)


class ThroughMap(pattern.RewriteRuleClassBase):
    """(B, N, C) → (B, C, N) → (B, C, H, W) → (B, C, N) → (B, N, C): nothing."""

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, x: Any) -> Any:
        """The detour."""
        planes = op.Reshape(op.Transpose(x, perm=[0, 2, 1]), _allow_other_inputs=True)
        rows = op.Reshape(planes, _allow_other_inputs=True, _outputs=["rows"])
        return op.Transpose(rows, perm=[0, 2, 1])

    def rewrite(self, op: Any, x: ir.Value, rows: ir.Value) -> ir.Value | None:
        """The tokens themselves; None if they come back in another shape."""
        return op.Identity(x) if view_dims(rows)[::-1] == static_dims(x) != () else None


RULES = (transpose_transpose_rule, MapToTokens.rule(), TokensToMap.rule(), ThroughMap.rule())


def _reshape(op: Any, x: ir.Value, out: ir.Value, *dims: int) -> ir.Value:
    shape = op.initializer(ir.tensor([0, *dims], ir.DataType.INT64), name_for(out, "dims"))
    return place(op.Reshape(x, shape), out, *(out.shape or ()))
