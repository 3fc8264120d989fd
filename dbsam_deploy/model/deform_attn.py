"""Multi-scale deformable attention (Deformable DETR, eq. 3) in plain PyTorch.

Shapes: B batch, Q queries, V value tokens (sum over levels), H heads, D channels a head, L levels,
P points. Sampling coordinates, interpolation weights and the weighted sum are FP32 whatever the
values' dtype is: at FP16 one sample in a hundred would fall into another cell of a 64×64 map.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = tuple[tuple[int, int], ...]


def reference_points(shapes: Shapes, device: torch.device | None = None) -> Tensor:
    """Centre of every query cell, level by level, row-major.

    Args:
        shapes: (height, width) of each query level.
        device: where the result lies.

    Returns:
        (1, Q, 1, 2) float32, x then y, in units of the map's side (0–1).
    """
    levels = []
    for height, width in shapes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        columns, rows = x.expand(height, width), y[:, None].expand(height, width)
        levels.append(torch.stack((columns, rows), -1).reshape(-1, 2))
    return torch.cat(levels)[None, :, None]


class DeformableSampling(nn.Module):
    """Sampling and weighted sum: the part without parameters, and the FP32 island of the block."""

    def forward(
        self, value: Tensor, shapes: Shapes, offsets: Tensor, weights: Tensor, centres: Tensor
    ) -> Tensor:
        """Gather P points per head and level around each query and sum them.

        Args:
            value: (B, V, H, D).
            shapes: (height, width) of each value level; V = sum of their products.
            offsets: (B, Q, H, L, P, 2) x, y in cells of the level's map.
            weights: (B, Q, H, L, P) logits; softmax runs over L·P.
            centres: (1, Q, 1, 2) from `reference_points`.

        Returns:
            (B, Q, H·D) in float32.
        """
        queries, heads, levels, points = (
            offsets.shape[1],
            offsets.shape[2],
            offsets.shape[3],
            offsets.shape[4],
        )
        depth = value.shape[-1]
        weights = weights.float().reshape(-1, queries, heads, levels * points).softmax(-1)
        # (B·H, 1, Q, L·P) to weigh channels-first samples
        weights = weights.transpose(1, 2).reshape(-1, 1, queries, levels * points)
        value = value.float()
        sampled, start = [], 0
        for level, (height, width) in enumerate(shapes):
            size = offsets.new_tensor([width, height], dtype=torch.float32)
            location = centres[:, :, None] + offsets[:, :, :, level].float() / size
            grid = (2 * location - 1).transpose(1, 2).reshape(-1, queries, points, 2)
            plane = value[:, start : start + height * width].permute(0, 2, 3, 1)
            plane = plane.reshape(-1, depth, height, width)
            sampled.append(
                F.grid_sample(
                    plane, grid, mode="bilinear", padding_mode="zeros", align_corners=False
                )
            )
            start += height * width
        # (B·H, D, Q, L·P) → (B·H, D, Q)
        summed = (torch.cat(sampled, -1) * weights).sum(-1)
        return summed.reshape(-1, heads * depth, queries).transpose(1, 2)


class MSDeformAttn(nn.Module):
    """Deformable DETR's module: offsets and weights from the query, samples from the value maps.

    Args:
        dim: channels of query, value and output.
        num_levels: value maps L.
        num_heads: heads H.
        num_points: points P per head and level.
    """

    def __init__(self, dim: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, samples * 2)
        self.attention_weights = nn.Linear(dim, samples)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.sampling = DeformableSampling()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Deformable DETR's start: each head looks along its own direction, p steps for point p."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * steps[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, value: Tensor, query_shapes: Shapes, value_shapes: Shapes
    ) -> Tensor:
        """Attend from every query cell into the value maps.

        Args:
            query: (B, Q, dim) tokens of the query levels, row-major.
            value: (B, V, dim) tokens of the value levels.
            query_shapes: (height, width) of each query level.
            value_shapes: (height, width) of each value level.

        Returns:
            (B, Q, dim), the query's dtype.
        """
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        queries = query.shape[1]
        tokens = self.value_proj(value)
        tokens = tokens.reshape(-1, value.shape[1], heads, value.shape[2] // heads)
        offsets = self.sampling_offsets(query).reshape(-1, queries, heads, levels, points, 2)
        weights = self.attention_weights(query).reshape(-1, queries, heads, levels, points)
        centres = reference_points(query_shapes, query.device)
        sampled = self.sampling(tokens, value_shapes, offsets, weights, centres)
        return self.output_proj(sampled.to(query.dtype))
