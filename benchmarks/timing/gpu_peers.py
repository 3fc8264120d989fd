"""What PyTorch users do without fused kernels: the peers that the GPU benchmarks measure against.

Every peer computes what the operators' references in `torch_ops` compute, with the same arguments,
but in the dtype of its inputs, as such code does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import FlexKernelOptions, flex_attention

from dbsam_deploy.graphs.encoder_decoder import EncoderGraph, RelPosAttention
from dbsam_deploy.model import DbSam
from dbsam_deploy.sessions.fused_model import FusedRelPosAttention


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, T, 3·H·D) → query, key and value, each (N, H, T, D)."""
    parts = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = parts.unbind(0)
    return q, k, v


def _joined(out: Tensor) -> Tensor:
    """(N, H, T, D) → (N, T, H·D)."""
    return out.transpose(1, 2).flatten(2)


def _bias_terms(
    q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, side: int
) -> tuple[Tensor, Tensor]:
    """The decomposed bias: by key row and by key column, each (N, H, T, S)."""
    cells = torch.arange(side, device=q.device)
    index = cells[:, None] - cells + side - 1
    grid = q.unflatten(2, (side, side))
    rows = torch.einsum("nhijd,ikd->nhijk", grid, rel_pos_h[index])
    columns = torch.einsum("nhijd,jkd->nhijk", grid, rel_pos_w[index])
    return rows.flatten(2, 3), columns.flatten(2, 3)


def _dense_bias(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, side: int) -> Tensor:
    """(N, H, T, T): 384 MiB in half precision for one 1024×1024 image and 12 heads."""
    rows, columns = _bias_terms(q, rel_pos_h, rel_pos_w, side)
    return (rows[..., None] + columns[..., None, :]).flatten(3)


def eager_attention(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, *, num_heads: int, side: int, scale: float
) -> Tensor:
    """SAM's own way: scores, bias and softmax as tensors; see `rel_pos_attention_reference`."""
    q, k, v = _heads(qkv, num_heads)
    scores = (q * scale) @ k.transpose(2, 3) + _dense_bias(q, rel_pos_h, rel_pos_w, side)
    return _joined(scores.softmax(-1) @ v)


def sdpa_attention(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, *, num_heads: int, side: int, scale: float
) -> Tensor:
    """`scaled_dot_product_attention` with the bias as a dense mask."""
    q, k, v = _heads(qkv, num_heads)
    bias = _dense_bias(q, rel_pos_h, rel_pos_w, side)
    return _joined(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale))


def flex_rel_pos_attention(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    *,
    num_heads: int,
    side: int,
    scale: float,
    backend: Literal["AUTO", "FLASH"] = "AUTO",
) -> Tensor:
    """FlexAttention, which adds the two terms inside its kernel; to be compiled.

    `backend` is that of its kernels: FLASH is FlashAttention's CuTe DSL, for Hopper and Blackwell.
    """
    q, k, v = _heads(qkv, num_heads)
    rows, columns = _bias_terms(q, rel_pos_h, rel_pos_w, side)

    def add_bias(score: Tensor, n: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + rows[n, h, query, key // side] + columns[n, h, query, key % side]

    options: FlexKernelOptions = {"BACKEND": backend}
    out = flex_attention(q, k, v, score_mod=add_bias, scale=scale, kernel_options=options)
    assert isinstance(out, Tensor)
    return _joined(out)


def eager_channel_attention(
    x: Tensor, *parameters: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """One PyTorch operator after the other; see `channel_attention_reference`."""
    norm_weight, norm_bias, dw_weight, fc1, fc2, pw_weight = parameters
    channels = x.shape[3]
    normed = F.layer_norm(x, (channels,), norm_weight, norm_bias, epsilon).permute(0, 3, 1, 2)
    hidden = F.gelu(F.conv2d(normed, dw_weight, padding=1, groups=channels))
    hidden = hidden.flatten(2).transpose(1, 2)
    gate = F.linear(F.gelu(F.linear(hidden.mean(1), fc1)), fc2).sigmoid()
    return hidden, gate[:, :, None] * pw_weight


flash_rel_pos_attention = partial(flex_rel_pos_attention, backend="FLASH")
"""FlexAttention on FlashAttention's kernels."""


def windows_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *tables: Tensor,
    attend: Callable[..., Tensor],
    side: int,
    **sizes: float,
) -> Tensor:
    """The way around an attention that takes windows: padded, cut up, put together, cut out.

    Args:
        x: (B, H, W, C) map.
        weight: (3·C, C) of the Linear layer.
        bias: (3·C,) of the same.
        tables: of relative positions.
        attend: the attention, with the signature of `rel_pos_attention_reference`.
        side: of the windows.
        sizes: the attention's other arguments.

    Returns:
        (B, H, W, C).
    """
    batch, height, width, channels = x.shape
    down, across = -(-height // side), -(-width // side)
    x = F.pad(x, (0, 0, 0, across * side - width, 0, down * side - height))
    x = x.reshape(batch, down, side, across, side, channels).transpose(2, 3)
    qkv = F.linear(x.reshape(-1, side * side, channels), weight, bias)
    out = attend(qkv, *tables, side=side, **sizes)
    out = out.reshape(batch, down, across, side, side, channels).transpose(2, 3)
    return out.reshape(batch, down * side, across * side, channels)[:, :height, :width]


def eager_depthwise_conv_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, *, height: int, width: int
) -> Tensor:
    """cuDNN's convolution of channels-last maps, then GELU; see `depthwise_conv_gelu_reference`."""
    maps = x.reshape(-1, height, width, x.shape[-1]).permute(0, 3, 1, 2)
    hidden = F.gelu(F.conv2d(maps, weight, bias, padding=1, groups=x.shape[-1]))
    return hidden.permute(0, 2, 3, 1).reshape(x.shape)


class PeerEncoder(nn.Module):
    """The reference's encoder with another attention; to be cast and compiled.

    With SAM's attention on `scaled_dot_product_attention` and the dense bias as its mask, in
    bfloat16 and compiled with mode `max-autotune`, it is the recipe of segment-anything-fast
    without that project's own Triton kernel.

    Args:
        model: reference model; it is copied, not changed.
        operator: the attention, with the signature of `rel_pos_attention_reference`.
    """

    def __init__(self, model: DbSam, operator: Callable[..., Tensor] = sdpa_attention) -> None:
        super().__init__()
        self.graph = EncoderGraph(model)
        for block in self.graph.modules():
            attention = getattr(block, "attn", None)
            if isinstance(attention, RelPosAttention):
                block.attn = FusedRelPosAttention(attention, operator=operator)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, 256, G, G), float32 in and out."""
        return self.graph(image)
