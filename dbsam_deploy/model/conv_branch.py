"""Convolution branch: light stacks that bring the image onto the ViT's grid (`LFIP0`, `LFIP6`).

Its input is the normalised, padded model-frame tensor, not the raw image.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ChannelLayerNorm

# Level → the side it is resized to, as a fraction of the model frame (1024 → 512, 256, 128, 64).
RESIZE_DIVISOR = {1: 2, 2: 4, 3: 8, 4: 16}
# LFIP0 strides of its three 3×3 convolutions per level; every level ends on the S/16 grid.
LFIP0_STRIDES = {1: (2, 2, 2), 2: (2, 2, 1), 3: (2, 1, 1), 4: (1, 1, 1)}
LFIP6_DIVISOR = 4


class Resize(nn.Module):
    """Bilinear resize to S/divisor, without antialiasing as torchvision ≤ 0.16 did by default."""

    def __init__(self, divisor: int, *, antialias: bool = False) -> None:
        super().__init__()
        self.divisor, self.antialias = divisor, antialias

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, 3, S/divisor, S/divisor)."""
        scale = 1 / self.divisor
        return F.interpolate(
            x,
            scale_factor=(scale, scale),
            mode="bilinear",
            align_corners=False,
            antialias=self.antialias,
        )


class ConvBlock(nn.Module):
    """Convolution without bias, then BatchNorm (eps 1e-5) and ReLU unless `plain`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, plain: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False
        )
        self.bn: nn.Module | None = (
            None if plain else nn.BatchNorm2d(outputs, eps=1e-5, momentum=0.01)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H/stride, W/stride)."""
        x = self.conv(x)
        return x if self.bn is None else F.relu(self.bn(x))


def _lfip0_level(level: int, stem: tuple[int, ...], dim: int) -> nn.Sequential:
    layers: list[nn.Module] = [Resize(RESIZE_DIVISOR[level])]
    inputs = 3
    for outputs, stride in zip(stem, LFIP0_STRIDES[level], strict=True):
        layers += [
            ConvBlock(inputs, outputs, 3, stride=stride),
            ConvBlock(outputs, outputs, 1),
        ]
        inputs = outputs
    layers += [ConvBlock(inputs, dim, 1, plain=True), ChannelLayerNorm(dim)]
    return nn.Sequential(*layers)


def _lfip6_level(stem: tuple[int, ...], dim: int) -> nn.Sequential:
    layers: list[nn.Module] = [Resize(LFIP6_DIVISOR)]
    inputs = 3
    for outputs in stem:
        layers += [ConvBlock(inputs, outputs, 3, stride=2), ConvBlock(outputs, outputs, 1)]
        inputs = outputs
    layers.append(ConvBlock(inputs, dim, 1, plain=True))
    return nn.Sequential(*layers)


class ConvPyramid(nn.Module):
    """`spatial_prior_module`: one stack `lcb{i}` per level.

    Args:
        kind: `lfip0` (levels 1–4) or `lfip6` (level 3, the paper's light block).
        levels: levels in use.
        stem: widths before the embedding width.
        dim: embedding width.
    """

    def __init__(self, kind: str, levels: tuple[int, ...], stem: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.names = [f"lcb{level}" for level in levels]
        for name, level in zip(self.names, levels, strict=True):
            stack = _lfip0_level(level, stem, dim) if kind == "lfip0" else _lfip6_level(stem, dim)
            self.add_module(name, stack)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, S, S) → one (B, dim, S/16, S/16) per level."""
        return [self.get_submodule(name)(image) for name in self.names]
