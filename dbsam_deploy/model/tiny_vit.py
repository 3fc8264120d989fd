"""TinyViT: the image encoder of `mobile_sam` and `lite_medsam`, under the checkpoints' names.

Architecture: Wu et al., "TinyViT", ECCV 2022 (5M size), with MobileSAM's change (ChaoningZhang/
MobileSAM), a last stage that keeps the resolution of the third, and LiteMedSAM's (bowang-lab/
MedSAM, branch LiteMedSAM), a patch embedding without stride, so that the first stage works on
pixels. Both train with drop path 0, so there is none here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.contract import EMBEDDING_CHANNELS
from .blocks import ChannelLayerNorm
from .config import TinyVitConfig


class ConvBn(nn.Module):
    """Convolution without bias, then BatchNorm, which exporters fold into it."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel: int = 1, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(
            in_dim, out_dim, kernel, stride, padding=kernel // 2, groups=groups, bias=False
        )
        self.bn: nn.Module = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim, H, W) → (B, out_dim, H/stride, W/stride)."""
        return self.bn(self.c(x))


class PatchEmbed(nn.Module):
    """RGB → first stage's width: two convolutions, pixel by pixel or 3×3 with a stride."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        kernel = 1 if stride == 1 else 3
        self.seq = nn.Sequential(
            ConvBn(3, dim // 2, kernel, stride=stride),
            nn.GELU(),
            ConvBn(dim // 2, dim, kernel, stride=stride),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, dim, H / stride², W / stride²)."""
        return self.seq(x)


class InvertedBottleneck(nn.Module):
    """GELU(x + conv1×1(GELU(DWConv3×3(GELU(conv1×1(x)))))), four times as wide inside (MBConv)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.conv1 = ConvBn(dim, hidden)
        self.conv2 = ConvBn(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvBn(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(hidden))


class Downsample(nn.Module):
    """To the next stage's width, and to half the resolution where `stride` is 2 (PatchMerging)."""

    def __init__(self, dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvBn(dim, out_dim)
        self.conv2 = ConvBn(out_dim, out_dim, 3, stride=stride, groups=out_dim)
        self.conv3 = ConvBn(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) → (B, out_dim, H/stride, W/stride)."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Multi-head attention within one window, biased by the distance |Δy|, |Δx| of two tokens.

    Args:
        dim: channels.
        num_heads: heads.
        window: side w of the window in tokens.
    """

    attention_bias_idxs: Tensor

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window * window))
        axis = torch.arange(window)
        y, x = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
        index = (y[:, None] - y).abs() * window + (x[:, None] - x).abs()
        self.register_buffer("attention_bias_idxs", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(windows, w*w, C) → (windows, w*w, C)."""
        count, tokens, dim = x.shape
        head_dim = dim // self.num_heads
        # Each head's query, key and value lie together in the checkpoint.
        qkv = self.qkv(self.norm(x)).reshape(count, tokens, self.num_heads, 3 * head_dim)
        q, k, v = qkv.transpose(1, 2).split(head_dim, dim=-1)
        bias = self.attention_biases[:, self.attention_bias_idxs]
        attention = (q * head_dim**-0.5) @ k.transpose(-2, -1) + bias
        out = attention.softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(count, tokens, dim))


class Mlp(nn.Module):
    """LayerNorm → fc1 → GELU → fc2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) → (..., C)."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class AttentionBlock(nn.Module):
    """x + attention, depthwise 3×3, x + MLP (`TinyViTBlock`).

    Args:
        dim: channels.
        num_heads: attention heads.
        window: side of the attention windows in tokens.
        grid: side of the stage's map, so that windows and padding are constants of the graph.
    """

    def __init__(self, dim: int, num_heads: int, window: int, grid: int) -> None:
        super().__init__()
        self.window, self.grid = window, grid
        self.attn = WindowAttention(dim, num_heads, window)
        self.mlp = Mlp(dim)
        self.local_conv = ConvBn(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, G, G) → (B, C, G, G)."""
        # Channels lie last, and the MLP's tokens on one axis, so that runtimes add, and multiply
        # by int8 weights, without moving anything; two blocks' transpositions cancel out.
        x = x.permute(0, 2, 3, 1)
        x = self.local_conv((x + self._attend(x)).permute(0, 3, 1, 2))
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        x = x + self.mlp(x)
        return x.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)

    def _attend(self, x: Tensor) -> Tensor:
        """Attention in windows of (B, G, G, C).

        The border windows are filled with zeros before the norm and nothing is masked: the filling
        takes part as keys and values, as it did in training.
        """
        dim, window = x.shape[3], self.window
        if self.grid == window:
            return self.attn(x.flatten(1, 2)).reshape(-1, window, window, dim)
        count = -(-self.grid // window)
        side = count * window
        x = F.pad(x, (0, 0, 0, side - self.grid, 0, side - self.grid))
        x = x.reshape(-1, count, window, count, window, dim).transpose(2, 3)
        x = self.attn(x.reshape(-1, window * window, dim))
        x = x.reshape(-1, count, count, window, window, dim).transpose(2, 3)
        return x.reshape(-1, side, side, dim)[:, : self.grid, : self.grid]


class Stage(nn.Module):
    """Blocks, then the way to the next stage where there is one."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the next stage's input, or the last stage's output."""
        x = self.blocks(x)
        return x if self.downsample is None else self.downsample(x)


class TinyVit(nn.Module):
    """TinyViT with SAM's neck.

    Args:
        config: widths, depths, heads, windows and strides of the four stages.
        image_size: side S of the model frame.
    """

    def __init__(self, config: TinyVitConfig, image_size: int) -> None:
        super().__init__()
        dims = config.embed_dims
        self.patch_embed = PatchEmbed(dims[0], config.patch_stride)
        self.layers = nn.Sequential()
        grid = image_size // config.patch_stride**2
        for i, dim in enumerate(dims):
            blocks: list[nn.Module] = [
                AttentionBlock(dim, config.num_heads[i], config.window_sizes[i], grid)
                if i
                else InvertedBottleneck(dim)
                for _ in range(config.depths[i])
            ]
            last = i == len(dims) - 1
            down = None if last else Downsample(dim, dims[i + 1], config.strides[i])
            self.layers.append(Stage(blocks, down))
            grid //= 1 if last else config.strides[i]
        self.neck = nn.Sequential(
            nn.Conv2d(dims[-1], EMBEDDING_CHANNELS, 1, bias=False),
            ChannelLayerNorm(EMBEDDING_CHANNELS),
            nn.Conv2d(EMBEDDING_CHANNELS, EMBEDDING_CHANNELS, 3, padding=1, bias=False),
            ChannelLayerNorm(EMBEDDING_CHANNELS),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Encode images.

        Args:
            image: (B, 3, S, S) float32, model frame.

        Returns:
            image_embeddings (B, 256, G, G), G = S / `TinyVitConfig.embedding_stride`.
        """
        return self.neck(self.layers(self.patch_embed(image)))
