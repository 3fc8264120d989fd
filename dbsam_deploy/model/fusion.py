"""ViT-Conv fusion blocks. All take and return tokens (B, N, C)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _FFN(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def _bottleneck(dim: int, reduction: int) -> nn.Sequential:
    hidden = dim // reduction
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False),
        nn.SiLU(),
        nn.LayerNorm(hidden),
        nn.Linear(hidden, dim, bias=False),
    )


class Dane(nn.Module):
    """As coded: M = σ(spatial(conv) + channel(mean(vit))), out = conv·M + vit·(1 - M), + FFN."""

    def __init__(self, dim: int, reduction: int) -> None:
        super().__init__()
        self.fc_spatial = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 1, bias=False))
        self.fc_channel = _bottleneck(dim, reduction)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = _FFN(dim)

    def forward(self, vit: Tensor, conv: Tensor) -> Tensor:
        """Fuse two (B, N, C) token sets."""
        mask = (self.fc_spatial(conv) + self.fc_channel(vit.mean(1, keepdim=True))).sigmoid()
        out = conv * mask + vit * (1 - mask)
        return out + self.ffn(self.ffn_norm(out))


class Dane3(nn.Module):
    """As coded: both gates are element-wise bottlenecks, otherwise `Dane`."""

    def __init__(self, dim: int, reduction: int) -> None:
        super().__init__()
        self.fc_spatial = _bottleneck(dim, reduction)
        self.fc_channel = _bottleneck(dim, reduction)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = _FFN(dim)

    def forward(self, vit: Tensor, conv: Tensor) -> Tensor:
        """Fuse two (B, N, C) token sets."""
        mask = (self.fc_spatial(conv) + self.fc_channel(vit)).sigmoid()
        out = conv * mask + vit * (1 - mask)
        return out + self.ffn(self.ffn_norm(out))


class FigureFusion(nn.Module):
    """The paper's equations: M = σ(Λ_d + Λ_s), F = F_d·M + F_s·(1 - M), Λ = FC(GELU(FC(F)))."""

    def __init__(self, dim: int, reduction: int) -> None:
        super().__init__()
        hidden = dim // reduction
        self.fc_vit = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.fc_conv = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, vit: Tensor, conv: Tensor) -> Tensor:
        """Fuse two (B, N, C) token sets."""
        mask = (self.fc_vit(vit) + self.fc_conv(conv)).sigmoid()
        return vit * mask + conv * (1 - mask)


class MultiConvDane(nn.Module):
    """`MultiConvFeatsDANE`: softmax over {conv_1 … conv_n, vit} per element, weighted sum, + FFN.

    Args:
        dim: channels.
        reduction: bottleneck factor.
        num_conv_gates: gates in the checkpoint; those beyond the maps given are never used.
    """

    def __init__(self, dim: int, reduction: int, num_conv_gates: int) -> None:
        super().__init__()
        self.vit_fc = _bottleneck(dim, reduction)
        self.conv_fc = nn.ModuleList(_bottleneck(dim, reduction) for _ in range(num_conv_gates))
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = _FFN(dim)

    def forward(self, vit: Tensor, convs: list[Tensor]) -> Tensor:
        """Fuse (B, N, C) ViT tokens with several (B, N, C) convolution token sets."""
        gates = [gate(x) for gate, x in zip(self.conv_fc, convs, strict=False)]
        weights = torch.stack([*gates, self.vit_fc(vit)]).softmax(0)
        out = vit * weights[-1]
        # Added up one by one: exporters turn a half-precision sum over an axis into float32.
        for conv, weight in zip(convs, weights, strict=False):
            out = out + conv * weight
        return out + self.ffn(self.ffn_norm(out))


FUSIONS = {"dane": Dane, "dane3": Dane3, "figure": FigureFusion}
