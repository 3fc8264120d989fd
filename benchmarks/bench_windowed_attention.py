"""Attention within windows: the kernel that takes the map, beside the one that takes windows.

With the Linear layer before it, which has fewer tokens where nothing is padded.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timing import gpu_peers

from dbsam_deploy.kernels import torch_ops
from dbsam_deploy.validation.measuring import Demand

HEADS, DEPTH, SIDE, GRID = 12, 64, 14, 64
"""As SAM's ViT-B calls it at 1024×1024."""


def fused(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *tables: torch.Tensor, **sizes
) -> torch.Tensor:
    """The Linear layer and the operator, on the map."""
    return torch_ops.windowed_attention(F.linear(x, weight, bias), bias, *tables, **sizes)


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *tables: torch.Tensor, **sizes
) -> torch.Tensor:
    """The same in plain PyTorch."""
    qkv = F.linear(x, weight, bias)
    return torch_ops.windowed_attention_reference(qkv, bias, *tables, **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 8])
def test_windowed_attention(compare_kernel, batch, dtype) -> None:
    channels, tokens = HEADS * DEPTH, batch * GRID**2
    sizes = {"num_heads": HEADS, "side": SIDE, "scale": DEPTH**-0.5}

    def draw() -> tuple[torch.Tensor, ...]:
        x = torch.randn(batch, GRID, GRID, channels, device="cuda", dtype=dtype)
        weight = torch.randn(3 * channels, channels, device="cuda", dtype=dtype) * channels**-0.5
        bias = torch.randn(3 * channels, device="cuda", dtype=dtype)
        tables = torch.randn(2, 2 * SIDE - 1, DEPTH, device="cuda", dtype=dtype) / 4
        return (x, weight, bias, *tables.unbind(0))

    windows = partial(gpu_peers.windows_of, attend=torch_ops.rel_pos_attention, **sizes)
    sdpa = partial(gpu_peers.windows_of, attend=gpu_peers.sdpa_attention, **sizes)
    variants = {
        "ours": partial(fused, **sizes),
        "ours, windows": windows,
        "compiled windows": torch.compile(windows, dynamic=False),
        "compiled SDPA": torch.compile(sdpa, dynamic=False),
    }
    elements = 8 * tokens * channels + 3 * channels**2  # x, qkv twice, out, and the weight
    count = batch * (-(-GRID // SIDE)) ** 2 * SIDE**2  # tokens of all windows
    flops = 6 * tokens * channels**2 + 4 * count * channels * (SIDE**2 + SIDE)
    work = Demand(elements * dtype.itemsize, flops)
    truth = partial(reference, **sizes)
    compare_kernel(variants, draw, truth, work, {"batch": batch}, bound=str(dtype)[6:])
