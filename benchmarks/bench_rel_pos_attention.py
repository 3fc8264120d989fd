"""Attention with relative positions: the fused kernel beside SDPA and FlexAttention."""

from functools import partial

import pytest
import torch
from timing import gpu_peers

from dbsam_deploy.kernels import library, torch_ops
from dbsam_deploy.kernels.nvrtc import has_nvcc
from dbsam_deploy.validation.measuring import Demand

HEADS, DEPTH = 12, 64

# name: (windows, side), as SAM's ViT-B calls it at 1024×1024
SHAPES = {"global": (1, 64), "windows": (25, 14), "windows, batch 8": (200, 14)}


def compact(
    qkv: torch.Tensor,
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    *,
    num_heads: int,
    side: int,
    scale: float,
) -> torch.Tensor:
    """The form that needs 48 KiB of shared memory, which no operator calls yet."""
    out = qkv.new_empty(*qkv.shape[:2], num_heads * DEPTH)
    library.call(
        torch_ops.kernel_library(qkv.device),
        "dbsam_rel_pos_attention_compact",
        *(tensor.data_ptr() for tensor in (qkv, rel_pos_h, rel_pos_w, out)),
        *(len(qkv), side, num_heads, DEPTH, scale, torch_ops.DTYPE_CODES[qkv.dtype]),
        torch.cuda.current_stream(qkv.device).cuda_stream,
    )
    return out


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
    if has_nvcc():  # NVRTC compiles only what operators call
        peers["ours, compact"] = compact
    compiled = {
        "compile": gpu_peers.eager_attention,
        "compiled SDPA": gpu_peers.sdpa_attention,
        "FlexAttention": gpu_peers.flex_rel_pos_attention,
        "FlexAttention FLASH": gpu_peers.flash_rel_pos_attention,
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
    work = Demand(elements * dtype.itemsize, flops)
    compare_kernel(variants, draw, reference, work, {"shape": shape})
