"""What the GPU benchmarks measure with: the package's stopwatch and ceilings, and a reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timing.ratios import Workload
from torch import Tensor

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.extras import TORCH_GPU_LINE
from dbsam_deploy.validation.measuring import (
    COPY_BYTES,
    GEMM_SIDE,
    WARM_UP_ROUNDS,
    Captured,
    Ceilings,
    CudaStopwatch,
    Stopwatch,
    as_tuple,
    cache_bytes,
    measure_ceilings,
    row_facts,
    sets_needed,
    take_turns,
    without_tf32,
)
from dbsam_deploy.validation.measuring import (
    Demand as Work,
)

__all__ = [
    "COPY_BYTES",
    "GEMM_SIDE",
    "WARM_UP_ROUNDS",
    "Captured",
    "Ceilings",
    "CudaStopwatch",
    "Stopwatch",
    "Work",
    "as_tuple",
    "cache_bytes",
    "gpu_reference_workload",
    "measure_ceilings",
    "peak_bytes",
    "require_cuda",
    "row_facts",
    "sets_needed",
    "synchronized",
    "take_turns",
    "without_tf32",
]


def require_cuda(what: str) -> None:
    """Refuse to go on without a GPU.

    Raises:
        EngineError: torch sees no CUDA device.
    """
    if not torch.cuda.is_available():
        raise EngineError(
            f"{what} needs a CUDA device, and this torch {torch.__version__} sees none; where "
            f"there is a GPU, {TORCH_GPU_LINE}"
        )


def gpu_reference_workload(device: str = "cuda", divide: int = 1) -> Workload:
    """What ratios on a GPU are taken to: a bfloat16 GEMM of side 4096 and a copy of 256 MiB.

    Its inputs come from a fixed seed. Changing it in any way makes every GPU baseline void.

    Args:
        device: where.
        divide: make bytes and sides this many times smaller, for tests.
    """
    generator = torch.Generator().manual_seed(1)
    side = 4096 // divide
    a = torch.randn(side, side, generator=generator).to(device, torch.bfloat16)
    source = torch.zeros((1 << 28) // divide, dtype=torch.uint8, device=device)
    product, target = torch.empty_like(a), torch.empty_like(source)

    def run() -> Tensor:
        torch.mm(a, a, out=product)
        target.copy_(source)
        _synchronize(product)
        return product

    return run


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def synchronized(work: Workload) -> Workload:
    """`work`, returning only when the device has done it."""

    def run() -> object:
        result = work()
        torch.cuda.synchronize()
        return result

    return run


def peak_bytes(function: Callable[..., Any], *inputs: Tensor) -> int:
    """Most device memory that one call takes beyond what was there before it, outputs included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
