"""SAM 2's image encoder in image mode, under the checkpoints' names: Hiera, FPN neck, finer maps.

Architecture: Ryali et al., "Hiera", ICML 2023, with the position tables of Bolya et al., "Window
Attention is Bug Compatible", as in SAM 2 (facebookresearch/sam2, Apache-2.0: `hieradet.py`,
`image_encoder.py`, and `SAM2ImagePredictor.set_image` for what an image alone goes through). Drop
path is for training and is not here. Grids are constants of a module, so that it is a graph too.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.contract import EMBEDDING_CHANNELS
from .config import HieraConfig

Features = tuple[Tensor, Tensor, Tensor]
"""Embedding (B, 256, G, G) and finer maps (B, 32, 4G, 4G), (B, 64, 2G, 2G)."""


class HieraPatchEmbed(nn.Module):
    """RGB → tokens of four pixels, by a 7×7 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 7, stride=4, padding=3)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, S/4, S/4, dim)."""
        return self.proj(image).permute(0, 2, 3, 1)


class HieraMlp(nn.Module):
    """Linear → GELU → Linear, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) → (..., dim)."""
        return self.layers[1](F.gelu(self.layers[0](x)))


class SquareAttention(nn.Module):
    """Attention of the tokens of a square; where it pools, one query for each 2×2 of them.

    Args:
        dim: channels in.
        out_dim: channels out.
        num_heads: heads.
        side: of the square, in tokens.
        pools: halve the square.
    """

    def __init__(self, dim: int, out_dim: int, num_heads: int, side: int, *, pools: bool) -> None:
        super().__init__()
        self.num_heads, self.side, self.pools = num_heads, side, pools
        self.scale = (out_dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * out_dim)
        self.proj = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(W, side, side, dim) → (W, side', side', out_dim) for W squares."""
        side, heads = self.side, self.num_heads
        out_side = side // 2 if self.pools else side
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.pools:
            q = halve(q, side)
        q, k, v = (
            part.reshape(-1, count * count, heads, part.shape[-1] // heads).transpose(1, 2)
            for part, count in ((q, out_side), (k, side), (v, side))
        )
        attended = ((q * self.scale) @ k.transpose(2, 3)).softmax(-1) @ v
        merged = (
            attended.transpose(1, 2).flatten(2).reshape(-1, out_side, out_side, heads * v.shape[3])
        )
        return self.proj(merged)


def halve(x: Tensor, side: int) -> Tensor:
    """(B, side, side, C) → (B, side/2, side/2, C): the largest value of each 2×2."""
    half = side // 2
    x = x.reshape(-1, half, 2, half, 2, x.shape[-1])
    x = torch.maximum(x[:, :, 0], x[:, :, 1])
    return torch.maximum(x[:, :, :, 0], x[:, :, :, 1])


class HieraBlock(nn.Module):
    """x + attention in windows or of the whole map, x + MLP; the first of a stage halves the map.

    Args:
        dim: channels in.
        out_dim: channels out.
        num_heads: attention heads.
        window: side of the windows in tokens; 0 for the whole map.
        grid: side of the map that comes in.
        pools: the first block of a later stage.
    """

    def __init__(
        self, dim: int, out_dim: int, num_heads: int, *, window: int, grid: int, pools: bool
    ) -> None:
        super().__init__()
        self.grid, self.pools = grid, pools
        self.window = window or grid
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SquareAttention(dim, out_dim, num_heads, self.window, pools=pools)
        self.norm2 = nn.LayerNorm(out_dim, eps=1e-6)
        self.mlp = HieraMlp(out_dim)
        if pools:
            self.proj = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, grid, grid, dim) → (B, grid', grid', out_dim)."""
        normed = self.norm1(x)
        shortcut = halve(self.proj(normed), self.grid) if self.pools else x
        x = shortcut + self._attend(normed)
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        """Incomplete windows are filled with zeros, which take part unmasked, as in training."""
        window, count = self.window, -(-self.grid // self.window)
        pad = count * window - self.grid
        x = F.pad(x, (0, 0, 0, pad, 0, pad))
        x = x.reshape(-1, count, window, count, window, x.shape[-1]).transpose(2, 3)
        x = self.attn(x.reshape(-1, window, window, x.shape[-1]))
        window, grid = (window // 2, self.grid // 2) if self.pools else (window, self.grid)
        x = x.reshape(-1, count, count, window, window, x.shape[-1]).transpose(2, 3)
        return x.reshape(-1, count * window, count * window, x.shape[-1])[:, :grid, :grid]


class Hiera(nn.Module):
    """The trunk: four stages, each at half the resolution and twice the width of the one before.

    Args:
        config: its sizes.
        image_size: side S of the model frame.
    """

    def __init__(self, config: HieraConfig, image_size: int) -> None:
        super().__init__()
        dim, heads, grid = config.embed_dim, config.num_heads, image_size // 4
        self.grid = grid
        self.ends = config.stage_ends
        side = config.position_side
        self.patch_embed = HieraPatchEmbed(dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, side, side))
        window = config.window_sizes[0]
        self.pos_embed_window = nn.Parameter(torch.zeros(1, dim, window, window))
        self.blocks = nn.ModuleList()
        self.widths: list[int] = []  # of the stages
        stage = 0
        for i in range(sum(config.depths)):
            # The block that halves the map still has the windows of the stage before.
            window = 0 if i in config.global_blocks else config.window_sizes[stage]
            pools = i > 0 and i - 1 in self.ends
            out_dim = 2 * dim if pools else dim
            if pools:
                heads, stage = 2 * heads, stage + 1
            self.blocks.append(
                HieraBlock(dim, out_dim, heads, window=window, grid=grid, pools=pools)
            )
            dim, grid = out_dim, grid // 2 if pools else grid
            if i in self.ends:
                self.widths.append(dim)

    def positions(self) -> Tensor:
        """(1, S/4, S/4, C): a coarse table for the whole map and one that each window repeats."""
        grid, window = self.grid, self.pos_embed_window
        coarse = F.interpolate(self.pos_embed, (grid, grid), mode="bicubic")
        times = grid // window.shape[-1]
        return (coarse + window.tile(1, 1, times, times)).permute(0, 2, 3, 1)

    def forward(self, image: Tensor, positions: Tensor | None = None) -> list[Tensor]:
        """What each stage makes of images.

        Args:
            image: (B, 3, S, S) float32, model frame.
            positions: as `positions` makes them.

        Returns:
            Four maps (B, C, H, W), the finest first.
        """
        x = self.patch_embed(image) + (self.positions() if positions is None else positions)
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.ends:
                maps.append(x.permute(0, 3, 1, 2))
        return maps


class Neck(nn.Module):
    """One 1×1 convolution for each stage, the coarsest first as in the checkpoints."""

    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=nn.Conv2d(dim, EMBEDDING_CHANNELS, 1)))
            for dim in reversed(dims)
        )

    def lateral(self, maps: list[Tensor], stage: int) -> Tensor:
        """(B, 256, H, W) of a stage, 0 the finest."""
        return self.convs[-1 - stage](maps[stage])


class HieraEncoder(nn.Module):
    """Trunk and neck, the decoder's convolutions of the finer maps, and the missing memory."""

    def __init__(self, trunk: Hiera) -> None:
        super().__init__()
        self.trunk, self.neck = trunk, Neck(trunk.widths)
        self.conv_s0 = nn.Conv2d(EMBEDDING_CHANNELS, EMBEDDING_CHANNELS // 8, 1)
        self.conv_s1 = nn.Conv2d(EMBEDDING_CHANNELS, EMBEDDING_CHANNELS // 4, 1)
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, EMBEDDING_CHANNELS))

    def forward(self, image: Tensor) -> Features:
        """Encode images (B, 3, S, S)."""
        maps = self.trunk(image)
        coarse = self.neck.lateral(maps, 3)
        embedding = self.neck.lateral(maps, 2) + F.interpolate(coarse, scale_factor=2.0)
        return (
            embedding + self.no_mem_embed.reshape(1, -1, 1, 1),
            self.conv_s0(self.neck.lateral(maps, 0)),
            self.conv_s1(self.neck.lateral(maps, 1)),
        )
