"""What the GPU benchmarks need beside the package's stopwatch and ceilings: a reference, peaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timing.ratios import Workload
from torch import Tensor

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.extras import TORCH_GPU_LINE
from dbsam_deploy.validation.measuring import Captured


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


def capture_all(
    variants: Mapping[str, Callable[..., Any]],
    sets: Sequence[tuple[Tensor, ...]],
    ours: str = "ours",
) -> tuple[dict[str, Captured], dict[str, str]]:
    """Every variant recorded, and in one line why a peer is not: the others go on without it.

    Args:
        variants: name → function.
        sets: see `Captured`.
        ours: the variant whose error is one.
    """
    graphs, missing = {}, {}
    for name, function in variants.items():
        try:
            graphs[name] = Captured(function, sets)
        except Exception as error:
            if name == ours:
                raise
            lines = str(error).strip().splitlines() or ["no message"]
            missing[f"no {name}"] = f"{type(error).__name__}: {lines[0]}"
    return graphs, missing


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
