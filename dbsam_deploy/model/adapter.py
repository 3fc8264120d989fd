"""The branch beside the ViT: convolution pyramid, coupling after each stage, fusion at the end."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .blocks import ChannelAttentionBlock, CrossAttentionBlock
from .config import FourBranchConfig, TwoBranchConfig
from .conv_branch import ConvPyramid
from .fusion import FUSIONS, MultiConvDane

RunBlocks = Callable[[Tensor], Tensor]
"""Three ViT blocks on tokens (B, G, G, C)."""


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


class _Adapter(nn.Module):
    """The convolution branch, with an embedding for each of its levels."""

    def __init__(self, dim: int, levels: int, prior: ConvPyramid) -> None:
        super().__init__()
        self.spatial_prior_module = prior
        self.level_embed = nn.Parameter(torch.zeros(levels, dim))
        nn.init.normal_(self.level_embed)

    def maps(self, image: Tensor) -> list[Tensor]:
        """(B, 3, S, S) model frame → the branch's maps, (B, C, h, w) each."""
        maps = self.spatial_prior_module(image)
        return [m + self.level_embed[i][None, :, None, None] for i, m in enumerate(maps)]


class TwoBranchAdapter(_Adapter):
    """The paper's graph (`TwoBranchImagePyramidAdapter`).

    After each stage: channel attention on the ViT map, then both directions of the deformable
    cross-attention, each from the maps as they were before the other's update.

    Args:
        dim: embedding width.
        config: see `TwoBranchConfig`.
    """

    def __init__(self, dim: int, config: TwoBranchConfig) -> None:
        count, heads, points = len(config.levels), config.num_heads, config.num_points
        prior = ConvPyramid(config.pyramid, config.levels, config.stem_channels, dim)
        super().__init__(dim, count, prior)
        self.position = config.channel_attention
        self.vit_cross_attn_blocks = nn.ModuleList(
            CrossAttentionBlock(dim, count, heads, points) for _ in range(4)
        )
        self.conv_cross_attn_blocks = nn.ModuleList(
            CrossAttentionBlock(dim, 1, heads, points) for _ in range(4)
        )
        self.vit_conv_blocks = nn.ModuleList(ChannelAttentionBlock(dim) for _ in range(4))
        self.conv = nn.Conv2d(dim * count, dim, 1)
        self.aggregation = FUSIONS[config.fusion](dim, config.fusion_reduction)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, image: Tensor, stages: list[RunBlocks]) -> Tensor:
        """Run the ViT's stages with the convolution branch beside them.

        Args:
            x: (B, G, G, C) patch embedding + position.
            image: (B, 3, S, S) model frame.
            stages: the four ViT stages.

        Returns:
            (B, C, G, G) fused, normalised map for SAM's neck.
        """
        maps = self.maps(image)
        for i, stage in enumerate(stages):
            vit = stage(x).permute(0, 3, 1, 2)
            if self.position == "before":
                vit = self.vit_conv_blocks[i](vit)
            before = vit
            vit = self.vit_cross_attn_blocks[i]([vit], maps)[0]
            maps = self.conv_cross_attn_blocks[i](maps, [before])
            if self.position == "after":
                vit = self.vit_conv_blocks[i](vit)
            x = vit.permute(0, 2, 3, 1)
        conv = self.conv(torch.cat(maps, 1))
        fused = self.norm(self.aggregation(x.flatten(1, 2), _tokens(conv)))
        return fused.transpose(1, 2).reshape(-1, conv.shape[1], conv.shape[2], conv.shape[3])


class FourBranchAdapter(_Adapter):
    """`FourBranchImagePyramidAdapter` (db_sam_plus): two joint self-attentions over five maps.

    Args:
        dim: embedding width.
        config: see `FourBranchConfig`.
    """

    def __init__(self, dim: int, config: FourBranchConfig) -> None:
        count, heads, points = len(config.levels), config.num_heads, config.num_points
        prior = ConvPyramid("lfip0", config.levels, config.stem_channels, dim)
        super().__init__(dim, count, prior)
        self.self_attn_blocks = nn.ModuleList(
            CrossAttentionBlock(dim, count + 1, heads, points) for _ in range(4)
        )
        self.self_attn_blocks1 = nn.ModuleList(
            CrossAttentionBlock(dim, count + 1, heads, points) for _ in range(4)
        )
        self.aggregation = MultiConvDane(dim, config.fusion_reduction, config.num_conv_gates)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, image: Tensor, stages: list[RunBlocks]) -> Tensor:
        """As `TwoBranchAdapter.forward`."""
        maps = self.maps(image)
        for i, stage in enumerate(stages):
            pyramid = [stage(x).permute(0, 3, 1, 2), *maps]
            pyramid = self.self_attn_blocks[i](pyramid, pyramid)
            pyramid = self.self_attn_blocks1[i](pyramid, pyramid)
            vit, maps = pyramid[0], pyramid[1:]
            x = vit.permute(0, 2, 3, 1)
        fused = self.norm(self.aggregation(x.flatten(1, 2), [_tokens(m) for m in maps]))
        channels, height, width = maps[0].shape[1:]
        return fused.transpose(1, 2).reshape(-1, channels, height, width)
