"""Channel attention block and bilateral (deformable) cross-attention block.

State-dict names follow the official checkpoints; see docs/concepts/model.md for the paper's names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deform_attn import MSDeformAttn, Shapes


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W): SAM's `LayerNorm2d` (eps 1e-6), same keys.

    Written as a transposed LayerNorm: the hand-written mean and variance of `LayerNorm2d` overflow
    in FP16, and exporters map this form to one LayerNormalization node.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) over C."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Channel gate: mean over the map → fc1 → GELU → fc2 → sigmoid → scale (reduction 1/4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // 4, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scale (B, C, H, W) by its own channel gate."""
        gate = self.fc2(F.gelu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class ChannelAttentionBlock(nn.Module):
    """F + Conv1x1(SE(GELU(DWConv3x3(LN(F))))), paper section 2.1; `MbConvBlock` in the code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pre_norm = ChannelLayerNorm(channels)
        self.conv_dw = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.se = SqueezeExcite(channels)
        self.conv_pw = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return x + self.conv_pw(self.se(F.gelu(self.conv_dw(self.pre_norm(x)))))


class _DepthwiseConv(nn.Module):
    """Holder that gives the convolution its checkpoint name `dwconv.dwconv`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x)


class MixFFN(nn.Module):
    """Feed-forward network with one depthwise 3×3 shared by all levels (`MSMixFFN`)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = _DepthwiseConv(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """(B, Q, dim) tokens of the levels in `shapes` → (B, Q, dim)."""
        hidden = self.fc1(x)
        maps = []
        for tokens, (height, width) in zip(
            hidden.split([h * w for h, w in shapes], 1), shapes, strict=True
        ):
            plane = tokens.transpose(1, 2).reshape(-1, hidden.shape[-1], height, width)
            maps.append(self.dwconv(plane).flatten(2).transpose(1, 2))
        return self.fc2(F.gelu(torch.cat(maps, 1)))


class CrossAttentionBlock(nn.Module):
    """One direction of the bilateral cross-attention (`MSDeformCrossAttnBlock`).

    x = q + DeformAttn(LN(q), LN(v));  x = x + FFN(LN(x)).

    Args:
        dim: channels.
        num_levels: value maps.
        num_heads: heads of the deformable attention.
        num_points: points per head and level.
    """

    def __init__(self, dim: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim)
        self.value_norm = nn.LayerNorm(dim)
        self.ffn_pre_norm = nn.LayerNorm(dim)
        self.attn = MSDeformAttn(dim, num_levels, num_heads, num_points)
        self.mlp = MixFFN(dim, 4 * dim)

    def forward(self, query: list[Tensor], value: list[Tensor]) -> list[Tensor]:
        """Update the query maps from the value maps.

        Args:
            query: maps (B, C, H, W).
            value: maps (B, C, H, W), as many as `num_levels`.

        Returns:
            The query maps, updated, each (B, C, H, W).
        """
        shapes: Shapes = tuple((q.shape[2], q.shape[3]) for q in query)
        value_shapes: Shapes = tuple((v.shape[2], v.shape[3]) for v in value)
        x = torch.cat([q.flatten(2).transpose(1, 2) for q in query], 1)
        v = torch.cat([m.flatten(2).transpose(1, 2) for m in value], 1)
        x = x + self.attn(self.query_norm(x), self.value_norm(v), shapes, value_shapes)
        x = x + self.mlp(self.ffn_pre_norm(x), shapes)
        parts = x.split([h * w for h, w in shapes], 1)
        return [
            part.transpose(1, 2).reshape(-1, part.shape[2], h, w)
            for part, (h, w) in zip(parts, shapes, strict=True)
        ]
