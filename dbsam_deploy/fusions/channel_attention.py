"""`dbsam::ChannelAttention`: the channel attention block up to its 1×1 convolution as one op.

LayerNorm, depthwise 3×3, GELU, and the squeeze-excite gate, which is folded into the weight of the
1×1 convolution: the graph around the op then computes x + hidden @ gated_weight on tokens. The
pattern is `dbsam_deploy.model.blocks.ChannelAttentionBlock`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript.rewriter import pattern

from .nodes import (
    GELU_CONSTANTS,
    equals,
    fused,
    is_convolution,
    name_for,
    parse_body,
    place,
    static_dims,
)

NAME = "ChannelAttention"
MAX_CHANNELS = 1024
BLOCKS = "image_encoder.adapter.vit_conv_blocks."
"""Where the blocks are in the encoder's graph; their number follows."""

BODY = f"""
<opset_import: ["" : 18], domain: "dbsam">
ChannelAttention <epsilon, channels, plugin_namespace, plugin_version>
(x, norm_weight, norm_bias, dw_weight, fc1, fc2, pw_weight) => (hidden, gated_weight) {{
{GELU_CONSTANTS}
  # GELU(DWConv(LN(x))), (B, C, H, W)
  normed = LayerNormalization <axis = -1, epsilon: float = @epsilon>
    (x, norm_weight, norm_bias)
  planes = Transpose <perm = [0, 3, 1, 2]> (normed)
  filtered = Conv
    <group: int = @channels, kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [1, 1]>
    (planes, dw_weight)
  filtered_scaled = Div (filtered, root)
  filtered_erf = Erf (filtered_scaled)
  filtered_sum = Add (filtered_erf, unit)
  filtered_twice = Mul (filtered, filtered_sum)
  hidden_planes = Mul (filtered_twice, half)

  # Gate sigmoid(fc2 GELU(fc1 mean)), (B, C)
  map_axes = Constant <value_ints = [2, 3]> ()
  mean = ReduceMean <keepdims = 0> (hidden_planes, map_axes)
  squeezed = Gemm <transB = 1> (mean, fc1)
  squeezed_scaled = Div (squeezed, root)
  squeezed_erf = Erf (squeezed_scaled)
  squeezed_sum = Add (squeezed_erf, unit)
  squeezed_twice = Mul (squeezed, squeezed_sum)
  activated = Mul (squeezed_twice, half)
  excited = Gemm <transB = 1> (activated, fc2)
  gate = Sigmoid (excited)

  last = Constant <value_ints = [2]> ()
  gate_column = Unsqueeze (gate, last)
  gated_weight = Mul (gate_column, pw_weight)
  row_shape = Constant <value_ints = [0, 0, -1]> ()
  hidden_rows = Reshape (hidden_planes, row_shape)
  hidden = Transpose <perm = [0, 2, 1]> (hidden_rows)
}}
"""


@dataclass(frozen=True)
class Block:
    """Sizes and matrices read from a matched graph.

    Attributes:
        height: of the map.
        width: of the map.
        channels: C.
        epsilon: of the LayerNorm.
        fc1: (R, C).
        fc2: (C, R).
        pw_weight: (C, C), inputs first.
    """

    height: int
    width: int
    channels: int
    epsilon: float
    fc1: npt.NDArray[Any]
    fc2: npt.NDArray[Any]
    pw_weight: npt.NDArray[Any]

    def attributes(self) -> dict[str, Any]:
        """The node's attributes; `channels` is the number of groups in the body's convolution."""
        return {"epsilon": self.epsilon, "channels": self.channels}


def supports(channels: int) -> bool:
    """Whether the kernel runs these sizes."""
    return channels % 8 == 0 and 0 < channels <= MAX_CHANNELS


class ChannelAttentionFusion(pattern.RewriteRuleClassBase):
    """`ChannelAttentionBlock` → one node, a matrix product and the residual, on tokens."""

    def pattern(
        self,
        op: Any,
        x: Any,
        norm_weight: Any,
        norm_bias: Any,
        epsilon: Any,
        dw_weight: Any,
        fc1: Any,
        fc2: Any,
        pw_weight: Any,
        root: Any,
        one: Any,
        half: Any,
        root2: Any,
        one2: Any,
        half2: Any,
    ) -> Any:
        """(B, C, H, W) → (B, C, H, W)."""

        def conv(x: Any, weight: Any, name: str) -> Any:
            return op.Conv(x, weight, _allow_other_inputs=True, _outputs=[name])

        tokens = op.Transpose(x, perm=[0, 2, 3, 1])
        normed = op.LayerNormalization(
            tokens, norm_weight, norm_bias, axis=-1, epsilon=epsilon, stash_type=1
        )
        filtered = conv(op.Transpose(normed, perm=[0, 3, 1, 2]), dw_weight, "filtered")
        hidden = op.Mul(
            op.Mul(filtered, op.Add(op.Erf(op.Div(filtered, root)), one)), half, _outputs=["hidden"]
        )
        squeezed = conv(op.ReduceMean(hidden, [2, 3], keepdims=1), fc1, "squeezed")
        activated = op.Mul(op.Mul(squeezed, op.Add(op.Erf(op.Div(squeezed, root2)), one2)), half2)
        gate = op.Sigmoid(conv(activated, fc2, "excited"))
        return op.Add(x, conv(op.Mul(hidden, gate), pw_weight, "update"), _outputs=["out"])

    def rewrite(self, op: Any, x: ir.Value, **parts: Any) -> ir.Value | None:
        """The op, its matrix product and the residual on tokens; None without a match.

        The transposes around it cancel those of the neighbours, which work on tokens as well.
        """
        block, out = read_block({"x": x, **parts}), parts["out"]
        if block is None:
            return None
        batch, height, width, channels = out.shape[0], block.height, block.width, block.channels
        tokens, maps = (batch, height * width, channels), (batch, height, width, channels)
        matrices = [
            op.initializer(ir.tensor(getattr(block, name)), name_for(out, name))
            for name in ("fc1", "fc2", "pw_weight")
        ]
        weights = (parts["norm_weight"], parts["norm_bias"], parts["dw_weight"], *matrices)
        map_shape = op.initializer(
            ir.tensor([0, *maps[1:]], ir.DataType.INT64), name_for(out, "map_shape")
        )
        source = place(op.Transpose(x, perm=[0, 2, 3, 1]), out, *maps)
        hidden, gated = fused(op, NAME, source, *weights, outputs=2, **block.attributes())
        place(hidden, out, *tokens)
        place(gated, out, batch, channels, channels)
        update = place(op.MatMul(hidden, gated), out, *tokens)
        update = place(op.Reshape(update, map_shape), out, *maps)
        total = place(op.Add(source, update), out, *maps)
        return place(op.Transpose(total, perm=[0, 3, 1, 2]), out, *out.shape)


def read_block(parts: dict[str, Any]) -> Block | None:
    """Read sizes and matrices of a matched graph.

    Args:
        parts: values and attributes by their name in the pattern.

    Returns:
        The block, or None if the graph computes something else or the kernel cannot run it.
    """
    shape = static_dims(parts["x"])
    weights = [parts[name].const_value for name in ("fc1", "fc2", "pw_weight")]
    if len(shape) != 3 or any(weight is None for weight in weights):
        return None
    channels, height, width = shape
    fc1, fc2, pw_weight = (weight.numpy() for weight in weights)
    reduced = fc1.shape[0]
    holds = (
        static_dims(parts["out"]) == shape
        and is_convolution(parts["filtered"], (channels, 1, 3, 3), padding=1, groups=channels)
        and is_convolution(parts["squeezed"], (reduced, channels, 1, 1))
        and is_convolution(parts["excited"], (channels, reduced, 1, 1))
        and is_convolution(parts["update"], (channels, channels, 1, 1))
        and all(parts[name].const_value is not None for name in ("norm_weight", "norm_bias"))
        and all(equals(parts[name], math.sqrt(2)) for name in ("root", "root2"))
        and all(equals(parts[name], 1) for name in ("one", "one2"))
        and all(equals(parts[name], 0.5) for name in ("half", "half2"))
        and supports(channels)
    )
    if not holds:
        return None
    return Block(
        *(height, width, channels, parts["epsilon"].as_float()),
        fc1=fc1.reshape(reduced, channels),
        fc2=fc2.reshape(channels, reduced),
        pw_weight=np.ascontiguousarray(pw_weight.reshape(channels, channels).T),
    )


def rules() -> list[pattern.RewriteRule]:
    """The rewrite rules of this op."""
    return [ChannelAttentionFusion.rule()]


def body() -> ir.Function:
    """The op in standard ops."""
    return parse_body(BODY)
