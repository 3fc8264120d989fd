"""Multi-scale deformable attention: the fused kernel beside PyTorch's grid_sample."""

from functools import partial

import pytest
import torch

from dbsam_deploy.kernels import torch_ops
from dbsam_deploy.validation.measuring import Demand

HEADS, DEPTH, POINTS, GRID = 12, 64, 4, 64

# name: (batch, query levels, value levels), as the variants of DB-SAM call it at 1024×1024
SHAPES = {
    "one level": (1, 1, 1),
    "one level, batch 8": (8, 1, 1),
    "ViT from four levels": (1, 1, 4),
    "five levels": (1, 5, 5),
}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_ms_deform_attn(compare_kernel, shape) -> None:
    batch, query_levels, levels = SHAPES[shape]
    queries, tokens, channels = query_levels * GRID**2, levels * GRID**2, HEADS * DEPTH
    samples = HEADS * levels * POINTS
    sizes = {
        "num_heads": HEADS,
        "num_points": POINTS,
        "level_shapes": [GRID] * 2 * levels,
        "query_shapes": [GRID] * 2 * query_levels,
    }

    def draw() -> tuple[torch.Tensor, ...]:
        value, offsets, weights = (
            torch.randn(batch, rows, columns, device="cuda", dtype=torch.float16)
            for rows, columns in ((tokens, channels), (queries, 2 * samples), (queries, samples))
        )
        return value, offsets * 3, weights

    eager = partial(torch_ops.ms_deform_attn_reference, **sizes)
    variants = {
        "ours": partial(torch_ops.ms_deform_attn, **sizes),
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    elements = batch * (tokens * channels + queries * (3 * samples + channels))
    compare_kernel(variants, draw, eager, Demand(2 * elements), {"shape": shape})
