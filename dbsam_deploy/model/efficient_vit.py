"""EfficientViT: the image encoder of EfficientViT-SAM, under the checkpoints' names.

Architecture: Cai et al., "EfficientViT", ICCV 2023 (the large models), and Zhang et al.,
"EfficientViT-SAM", 2024: convolutions, and from the late stages on attention whose cost grows
linearly with the pixels. A neck adds three stages at the size of SAM's embedding. Structure and
names follow mit-han-lab/efficientvit (PyPI: `efficientsam` 1.0.0).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.contract import EMBEDDING_CHANNELS
from .blocks import ChannelLayerNorm
from .config import BlockKind, EfficientVitConfig

NORM_EPS = 1e-6
"""eps of every BatchNorm and LayerNorm, those of the mask decoder included."""
_SUM_EPS = 1e-15
"""Keeps a pixel that attends to nothing at zero."""


class ConvNorm(nn.Module):
    """Convolution, then BatchNorm and GELU (its tanh form) where there are any (`ConvLayer`).

    Args:
        in_dim: channels in.
        out_dim: channels out.
        kernel: side of the kernel; the padding keeps the size.
        stride: of the convolution.
        groups: of the convolution.
        norm: whether a BatchNorm follows.
        act: whether GELU does.
        bias: of the convolution; by default where no BatchNorm follows.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        norm: bool = True,
        act: bool = False,
        bias: bool | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_dim,
            out_dim,
            kernel,
            stride,
            padding=kernel // 2,
            groups=groups,
            bias=not norm if bias is None else bias,
        )
        self.norm: nn.Module = nn.BatchNorm2d(out_dim, eps=NORM_EPS) if norm else nn.Identity()
        self.act: nn.Module = nn.GELU(approximate="tanh") if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim, H, W) → (B, out_dim, H/stride, W/stride), sizes rounded up."""
        return self.act(self.norm(self.conv(x)))


class ConvPair(nn.Module):
    """3×3 → GELU → 3×3 (`ResBlock`)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, dim, 3, act=True)
        self.conv2 = ConvNorm(dim, dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return self.conv2(self.conv1(x))


class FusedBottleneck(nn.Module):
    """3×3 to the width inside → GELU → 1×1 (`FusedMBConv`).

    Args:
        in_dim: channels in.
        out_dim: channels out.
        expand: channels inside, in multiples of `in_dim`.
        stride: of the first convolution.
    """

    def __init__(self, in_dim: int, out_dim: int, expand: int, stride: int = 1) -> None:
        super().__init__()
        self.spatial_conv = ConvNorm(in_dim, expand * in_dim, 3, stride=stride, act=True)
        self.point_conv = ConvNorm(expand * in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim, H, W) → (B, out_dim, H/stride, W/stride)."""
        return self.point_conv(self.spatial_conv(x))


class Bottleneck(nn.Module):
    """1×1 → GELU → depthwise 3×3 → GELU → 1×1 (`MBConv`), with a norm behind the last alone.

    Args are those of `FusedBottleneck`.
    """

    def __init__(self, in_dim: int, out_dim: int, expand: int, stride: int = 1) -> None:
        super().__init__()
        hidden = expand * in_dim
        self.inverted_conv = ConvNorm(in_dim, hidden, norm=False, act=True)
        self.depth_conv = ConvNorm(
            hidden, hidden, 3, stride=stride, groups=hidden, norm=False, act=True
        )
        self.point_conv = ConvNorm(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim, H, W) → (B, out_dim, H/stride, W/stride)."""
        return self.point_conv(self.depth_conv(self.inverted_conv(x)))


class LinearAttention(nn.Module):
    """Attention with ReLU(q)·ReLU(k) for weights: keys and values are summed before any query.

    To be computed in float32: sums over thousands of pixels leave the range of float16, in which
    `_SUM_EPS` is zero besides. The family's code takes another order for maps of at most `head_dim`
    pixels, with the same result.

    Args:
        head_dim: channels of a head.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, qkv: Tensor) -> Tensor:
        """(B, heads · 3 · head_dim, H, W), query, key and value of a head together → a third."""
        channels, height, width = qkv.shape[1:]
        heads = channels // (3 * self.head_dim)
        q, k, v = qkv.reshape(-1, heads, 3, self.head_dim, height * width).unbind(2)
        q, k = q.relu(), k.relu().transpose(2, 3)
        total = k.sum(2, keepdim=True) @ q
        out = (v @ k) @ q / (total + _SUM_EPS)
        return out.reshape(-1, channels // 3, height, width)


class MultiScaleAttention(nn.Module):
    """Linear attention over q, k and v as they are, and as sums over neighbours (`LiteMLA`).

    Args:
        dim: channels.
        head_dim: channels of a head.
        kernel: side of the neighbourhood.
    """

    def __init__(self, dim: int, head_dim: int, kernel: int) -> None:
        super().__init__()
        heads = dim // head_dim
        inner = heads * head_dim
        self.qkv = ConvNorm(dim, 3 * inner, norm=False, bias=False)
        depthwise = nn.Conv2d(
            3 * inner, 3 * inner, kernel, padding=kernel // 2, groups=3 * inner, bias=False
        )
        mixed = nn.Conv2d(3 * inner, 3 * inner, 1, groups=3 * heads, bias=False)
        self.aggreg = nn.ModuleList([nn.Sequential(depthwise, mixed)])
        self.linear_attention = LinearAttention(head_dim)
        self.proj = ConvNorm(2 * inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        qkv = self.qkv(x)
        scales = [qkv, *(summed(qkv) for summed in self.aggreg)]
        return self.proj(self.linear_attention(torch.cat(scales, 1)))


class Residual(nn.Module):
    """x + main(x), or main(x) where the size changes."""

    def __init__(self, main: nn.Module, *, shortcut: bool = True) -> None:
        super().__init__()
        self.main, self.has_shortcut = main, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → what `main` makes of it."""
        return self.main(x) + x if self.has_shortcut else self.main(x)


class LinearAttentionBlock(nn.Module):
    """Attention, then a bottleneck, each with a residual (`EfficientViTBlock`)."""

    def __init__(self, dim: int, expand: int, config: EfficientVitConfig) -> None:
        super().__init__()
        attention = MultiScaleAttention(dim, config.head_dim, config.attention_kernel)
        self.context_module = Residual(attention)
        self.local_module = Residual(Bottleneck(dim, dim, expand))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return self.local_module(self.context_module(x))


class Operations(nn.Module):
    """One after the other (`OpSequential`)."""

    def __init__(self, *operations: nn.Module) -> None:
        super().__init__()
        self.op_list = nn.Sequential(*operations)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → what the last one makes of it."""
        return self.op_list(x)


class Upsample(nn.Module):
    """To a fixed side, bicubic; a map of that side stays as it is."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, side, side)."""
        if x.shape[2:] == (self.side, self.side):
            return x
        return F.interpolate(x, (self.side, self.side), mode="bicubic", align_corners=False)


class Backbone(nn.Module):
    """Stages, each at half the size of the one before it; the first at half the image's."""

    def __init__(self, config: EfficientVitConfig) -> None:
        super().__init__()
        first = config.widths[0]
        stem: list[nn.Module] = [Residual(ConvPair(first)) for _ in range(config.depths[0])]
        self.stages = nn.ModuleList([Operations(ConvNorm(3, first, 3, stride=2, act=True), *stem)])
        for i, width in enumerate(config.widths[1:], 1):
            kind, expand = config.kinds[i], config.expand[i]
            down = FusedBottleneck if kind == "fused" else Bottleneck
            entry = Residual(down(config.widths[i - 1], width, 4 * expand, 2), shortcut=False)
            blocks = [_block(kind, width, expand, config) for _ in range(config.depths[i])]
            self.stages.append(Operations(entry, *blocks))

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, S, S) → the output of each stage."""
        maps = [image]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


def _block(kind: BlockKind, dim: int, expand: int, config: EfficientVitConfig) -> nn.Module:
    if kind == "attention":
        return LinearAttentionBlock(dim, expand, config)
    block = FusedBottleneck if kind == "fused" else Bottleneck
    return Residual(block(dim, dim, expand))


class SummingNeck(nn.Module):
    """The last three stages, each at the embedding's size and width, summed (`SamNeck`)."""

    def __init__(self, config: EfficientVitConfig, grid: int) -> None:
        super().__init__()
        width = EMBEDDING_CHANNELS
        self.input_ops = nn.ModuleList(
            Operations(ConvNorm(dim, width), Upsample(grid)) for dim in config.widths[:-4:-1]
        )
        self.middle = Operations(
            *(
                Residual(FusedBottleneck(width, width, config.neck_expand))
                for _ in range(config.neck_depth)
            )
        )
        self.output_ops = nn.ModuleList([Operations(ConvNorm(width, width, norm=False))])

    def forward(self, maps: list[Tensor]) -> Tensor:
        """The stages' outputs → (B, 256, G, G)."""
        last, middle, first = (
            place(x) for place, x in zip(self.input_ops, maps[:-4:-1], strict=True)
        )
        return self.output_ops[0](self.middle(last + (middle + first)))


class EfficientVit(nn.Module):
    """EfficientViT with EfficientViT-SAM's neck.

    Args:
        config: widths, depths and kinds of the stages.
        grid: side G of the embedding, whatever the side of the image is.
    """

    def __init__(self, config: EfficientVitConfig, grid: int) -> None:
        super().__init__()
        self.backbone = Backbone(config)
        self.neck = SummingNeck(config, grid)
        self.norm = ChannelLayerNorm(EMBEDDING_CHANNELS, eps=NORM_EPS)

    def forward(self, image: Tensor) -> Tensor:
        """Encode images.

        Args:
            image: (B, 3, S, S) float32, as the encoder takes it.

        Returns:
            image_embeddings (B, 256, G, G).
        """
        return self.norm(self.neck(self.backbone(image)))
