"""The adapter that SAM-Med2D puts beside the MLP of each ViT block.

Cheng et al., "SAM-Med2D", 2023 (OpenGVLab/SAM-Med2D). Its checkpoints call it `blocks.N.Adapter`;
here it stands within the block's MLP, `blocks.N.mlp.adapter`, whose sum the block adds to its
tokens in any case, so that everything which runs a ViT's blocks runs these too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .sam import MLPBlock

REDUCTION = 4


class BlockAdapter(nn.Module):
    """A gate over channels, a way through half the resolution and back, and a norm.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.channel = nn.Sequential(
            nn.Linear(dim, dim // REDUCTION, bias=False),
            nn.ReLU(),
            nn.Linear(dim // REDUCTION, dim, bias=False),
            nn.Sigmoid(),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(dim, dim, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, G, G, C) → (B, G, G, C), G even."""
        gated = self.channel(x.mean((1, 2), keepdim=True)) * x
        spatial = self.spatial(gated.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(x + spatial)


class AdaptedMlp(MLPBlock):
    """MLP + adapter of the same normalised tokens, under the names of SAM's `MLPBlock`.

    Args:
        mlp: SAM's, whose weights are taken.
        dim: channels.
    """

    def __init__(self, mlp: Any, dim: int) -> None:
        nn.Module.__init__(self)
        self.lin1, self.lin2, self.act = mlp.lin1, mlp.lin2, mlp.act
        self.adapter = BlockAdapter(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, G, G, C) → (B, G, G, C)."""
        return super().forward(x) + self.adapter(x)


def add_adapters(encoder: Any, dim: int) -> None:
    """Give each block of SAM's ViT an adapter with fresh weights."""
    for block in encoder.blocks:
        block.mlp = AdaptedMlp(block.mlp, dim)
