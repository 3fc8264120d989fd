"""What each fused kernel computes, in plain PyTorch (kernels/README.md has the maths).

They compute in float32 and round once, into the dtype of the inputs, as the kernels do.

Shapes: B batch, N windows, Q queries, V value tokens, H heads, D channels a head, L levels,
P points, S side of a token window, C channels, R squeezed channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import InputError
from ..model.deform_attn import DeformableSampling, Shapes, reference_points


def as_shapes(sizes: Sequence[int]) -> Shapes:
    """[h0, w0, h1, w1, …] → ((h0, w0), (h1, w1), …).

    Raises:
        InputError: an odd number of sizes, none, or one that is not positive.
    """
    if not sizes or len(sizes) % 2 or min(sizes) < 1:
        raise InputError(f"shapes {list(sizes)}: expected height and width, at least 1, per level")
    return tuple(zip(sizes[::2], sizes[1::2], strict=True))


def ms_deform_attn_reference(
    value: Tensor,
    offsets: Tensor,
    weights: Tensor,
    *,
    num_heads: int,
    num_points: int,
    level_shapes: Sequence[int],
    query_shapes: Sequence[int],
) -> Tensor:
    """Softmax, sampling and weighted sum of multi-scale deformable attention.

    Args:
        value: (B, V, H·D).
        offsets: (B, Q, H·L·P·2), laid out (H, L, P, 2): x, y in cells of the level's map.
        weights: (B, Q, H·L·P) logits; softmax runs over L·P.
        num_heads: H.
        num_points: P.
        level_shapes: height and width of each value level; V is the sum of their products.
        query_shapes: height and width of each query level; Q is the sum of their products.

    Returns:
        (B, Q, H·D), the dtype of `value`.
    """
    levels, (batch, queries) = as_shapes(level_shapes), offsets.shape[:2]
    sampled = DeformableSampling()(
        value.reshape(batch, value.shape[1], num_heads, -1),
        levels,
        offsets.reshape(batch, queries, num_heads, len(levels), num_points, 2),
        weights.reshape(batch, queries, num_heads, len(levels), num_points),
        reference_points(as_shapes(query_shapes), value.device),
    )
    return sampled.to(value.dtype).contiguous()


def channel_attention_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    dw_weight: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    pw_weight: Tensor,
    *,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """The channel attention block up to its 1×1 convolution, whose weight takes in the gate.

    The block's output is x + hidden @ gated_weight, so no tensor is read and written again only to
    be scaled.

    Args:
        x: (B, H, W, C) map, channels last.
        norm_weight: (C,) scale of the LayerNorm.
        norm_bias: (C,) shift of the LayerNorm.
        dw_weight: (C, 1, 3, 3) depthwise convolution; its zero padding comes after the LayerNorm.
        fc1: (R, C) squeeze.
        fc2: (C, R) excite.
        pw_weight: (C, C_out) 1×1 convolution, input channels first.
        epsilon: of the LayerNorm.

    Returns:
        hidden (B, H·W, C) and gated_weight (B, C, C_out), the dtype of `x`.
    """
    batch, height, width, channels = x.shape
    normed = F.layer_norm(x.float(), (channels,), norm_weight.float(), norm_bias.float(), epsilon)
    hidden = F.conv2d(normed.permute(0, 3, 1, 2), dw_weight.float(), padding=1, groups=channels)
    hidden = F.gelu(hidden).flatten(2).transpose(1, 2)
    squeezed = F.gelu(F.linear(hidden.mean(1), fc1.float()))
    gate = F.linear(squeezed, fc2.float()).sigmoid()
    gated_weight = gate[:, :, None] * pw_weight.float()
    hidden = hidden.reshape(batch, height * width, channels)
    return hidden.to(x.dtype).contiguous(), gated_weight.to(x.dtype)


def rel_pos_attention_reference(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    *,
    num_heads: int,
    side: int,
    scale: float,
) -> Tensor:
    """SAM's attention with decomposed relative positions, between its two Linear layers.

    score = scale·q·k + q·rel_pos_h[qh-kh+S-1] + q·rel_pos_w[qw-kw+S-1]: the bias takes the
    unscaled query, as in SAM.

    Args:
        qkv: (N, S·S, 3·H·D) as SAM's Linear gives it: query, key and value, each (H, D).
        rel_pos_h: (2S-1, D) table of row distances.
        rel_pos_w: (2S-1, D) table of column distances.
        num_heads: H.
        side: S.
        scale: of the product of query and key; SAM has D^-0.5.

    Returns:
        (N, S·S, H·D), the dtype of `qkv`.
    """
    windows, tokens, packed = qkv.shape
    depth = packed // (3 * num_heads)
    parts = qkv.float().reshape(windows, tokens, 3, num_heads, depth).permute(2, 0, 3, 1, 4)
    q, k, v = parts.unbind(0)
    cells = torch.arange(side, device=qkv.device)
    index = cells[:, None] - cells + side - 1
    grid = q.reshape(windows, num_heads, side, side, depth)
    bias_h = torch.einsum("nhijd,ikd->nhijk", grid, rel_pos_h.float()[index])
    bias_w = torch.einsum("nhijd,jkd->nhijk", grid, rel_pos_w.float()[index])
    scores = (q * scale @ k.transpose(2, 3)).reshape(*grid.shape[:-1], side, side)
    scores = scores + bias_h[..., None] + bias_w[..., None, :]
    out = scores.reshape(windows, num_heads, tokens, tokens).softmax(-1) @ v
    return out.transpose(1, 2).reshape(windows, tokens, num_heads * depth).to(qkv.dtype)


def windowed_attention_reference(
    qkv: Tensor,
    qkv_bias: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    *,
    num_heads: int,
    side: int,
    scale: float,
) -> Tensor:
    """`rel_pos_attention_reference` within the windows of a map that is not cut up.

    SAM pads the map with zeros before the Linear layer, so that what a window has beyond the map is
    the layer's bias: as keys and values it takes part in the softmax, unmasked.

    Args:
        qkv: (B, height, width, 3·H·D) as SAM's Linear gives it, of the map without padding.
        qkv_bias: (3·H·D,) of that layer.
        rel_pos_h: (2S-1, D) table of row distances.
        rel_pos_w: (2S-1, D) table of column distances.
        num_heads: H.
        side: S of the windows, which begin at the upper left corner.
        scale: of the product of query and key; SAM has D^-0.5.

    Returns:
        (B, height, width, H·D), the dtype of `qkv`.
    """
    batch, height, width, packed = qkv.shape
    down, across = -(-height // side), -(-width // side)
    whole = qkv_bias.repeat(batch, down * side, across * side, 1)
    whole[:, :height, :width] = qkv
    windows = whole.reshape(batch, down, side, across, side, packed).transpose(2, 3)
    out = rel_pos_attention_reference(
        windows.reshape(-1, side * side, packed),
        rel_pos_h,
        rel_pos_w,
        num_heads=num_heads,
        side=side,
        scale=scale,
    )
    out = out.reshape(batch, down, across, side, side, -1).transpose(2, 3)
    return out.reshape(batch, down * side, across * side, -1)[:, :height, :width].contiguous()


def depthwise_conv_gelu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, *, height: int, width: int
) -> Tensor:
    """Depthwise 3×3 convolution of token maps, bias and GELU: the middle of `MixFFN`.

    Args:
        x: (B, Q, C) tokens of one or several H×W maps, one behind the other; Q = L·H·W.
        weight: (C, 1, 3, 3); zeros lie around each map.
        bias: (C,).
        height: H.
        width: W.

    Returns:
        (B, Q, C), the dtype of `x`.
    """
    channels = x.shape[-1]
    maps = x.float().reshape(-1, height, width, channels).permute(0, 3, 1, 2)
    filtered = F.conv2d(maps, weight.float(), bias.float(), padding=1, groups=channels)
    return F.gelu(filtered).permute(0, 2, 3, 1).reshape(x.shape).to(x.dtype)
