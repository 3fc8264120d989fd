"""Attention with relative positions: the fused kernel beside SDPA and FlexAttention."""

from functools import partial

import pytest
import torch
from timing import gpu_peers
from timing.gpu import Work

from dbsam_deploy.kernels import torch_ops

HEADS, DEPTH = 12, 64

# name: (windows, side), as SAM's ViT-B calls it at 1024×1024
SHAPES = {"global": (1, 64), "windows": (25, 14), "windows, batch 8": (200, 14)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rel_pos_attention(compare_kernel, shape, dtype) -> None:
    windows, side = SHAPES[shape]
    tokens, channels = side**2, HEADS * DEPTH
    sizes = {"num_heads": HEADS, "side": side, "scale": DEPTH**-0.5}

    def draw() -> tuple[torch.Tensor, ...]:
        qkv = torch.randn(windows, tokens, 3 * channels, device="cuda", dtype=dtype)
        tables = torch.randn(2, 2 * side - 1, DEPTH, device="cuda", dtype=dtype) / 4
        return (qkv, *tables.unbind(0))

    peers = {
        "eager": gpu_peers.eager_attention,
        "SDPA": gpu_peers.sdpa_attention,
    }
    compiled = {
        "compile": gpu_peers.eager_attention,
        "compiled SDPA": gpu_peers.sdpa_attention,
        "FlexAttention": gpu_peers.flex_rel_pos_attention,
    }
    variants = {
        "ours": partial(torch_ops.rel_pos_attention, **sizes),
        **{name: partial(peer, **sizes) for name, peer in peers.items()},
        **{
            name: torch.compile(partial(peer, **sizes), dynamic=False)
            for name, peer in compiled.items()
        },
    }
    reference = partial(torch_ops.rel_pos_attention_reference, **sizes)
    elements = 4 * windows * tokens * channels + 2 * (2 * side - 1) * DEPTH
    flops = 4 * windows * HEADS * DEPTH * tokens * (tokens + side)
    work = Work(elements * dtype.itemsize, flops)
    compare_kernel(variants, draw, reference, work, {"shape": shape})
