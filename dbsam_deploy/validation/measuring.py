"""Time on a GPU: variants in turns, and the ceilings they are held against, in the same run.

Kernels take microseconds, so a variant is timed as a CUDA graph that calls it once for each of
several input sets. Together the sets exceed the L2 cache, and the launch of the graph hides behind
a large copy, which also empties that cache. What is reported is the time of one call. Tensors are
PyTorch's, which is imported where it is used.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 30
WARM_UP_ROUNDS = 3
MIN_SETS, MAX_SETS = 4, 64
CACHE_MULTIPLE = 3
"""The input sets of a benchmark together are at least this many times the L2 cache."""

GEMM_SIDE = 8192
COPY_BYTES = 1 << 30
LEAD_BYTES = 1 << 29

Outputs: TypeAlias = "Tensor | tuple[Tensor, ...]"
Stopwatch = Callable[[Callable[[], object]], float]
"""work → seconds that the device took for it."""


@dataclass(frozen=True)
class Demand:
    """What one call must do, whoever does it.

    Attributes:
        bytes: every input read once and every output written once.
        flops: floating-point operations, a multiply-add counted as two.
    """

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches where nothing else limits it, measured.

    Attributes:
        copy_gb_s: device-to-device copy, bytes read plus bytes written, 1e9 bytes a second.
        gemm_tflop_s: matrix product of random data, 1e12 operations a second.
    """

    copy_gb_s: float
    gemm_tflop_s: float


class CudaStopwatch:
    """Seconds between two CUDA events around the work, with a large copy ahead of them.

    While the copy runs, the host queues the work: its launch costs no time on the device.
    """

    def __init__(self) -> None:
        import torch

        self._source = torch.empty(LEAD_BYTES, dtype=torch.uint8, device="cuda")
        self._target = torch.empty_like(self._source)

    def __call__(self, work: Callable[[], object]) -> float:
        """Time one call of `work`."""
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._target.copy_(self._source)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def take_turns(
    variants: Mapping[str, Callable[[], object]],
    stopwatch: Stopwatch,
    *,
    rounds: int = ROUNDS,
) -> dict[str, float]:
    """Median seconds of each variant over rounds that time all of them, the order rotating.

    Args:
        variants: name → work.
        stopwatch: times one call.
        rounds: timed rounds after the warm-up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for round_number in range(-WARM_UP_ROUNDS, rounds):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed = stopwatch(variants[name])
            if round_number >= 0:
                seconds[name].append(elapsed)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure_ceilings(
    stopwatch: Stopwatch, *, device: str = "cuda", dtype: str = "bfloat16", divide: int = 1
) -> Ceilings:
    """Measure the copy bandwidth and the GEMM rate of the device.

    Args:
        stopwatch: times one call.
        device: where.
        dtype: of the matrices.
        divide: make bytes and sides this many times smaller.
    """
    import torch

    source = torch.empty(COPY_BYTES // divide, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    side = GEMM_SIDE // divide
    a, b = (torch.randn(side, side, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    out = torch.empty_like(a)
    work = {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, b, out=out)}
    seconds = take_turns(work, stopwatch, rounds=10)
    return Ceilings(
        copy_gb_s=2 * source.numel() / seconds["copy"] / 1e9,
        gemm_tflop_s=2 * side**3 / seconds["gemm"] / 1e12,
    )


def sets_needed(bytes_per_call: int, cache_bytes: int) -> int:
    """Input sets that together exceed the L2 cache, within limits."""
    wanted = math.ceil(CACHE_MULTIPLE * cache_bytes / bytes_per_call)
    return min(max(wanted, MIN_SETS), MAX_SETS)


def cache_bytes(device: int = 0) -> int:
    """Size of the L2 cache."""
    import torch

    return int(torch.cuda.get_device_properties(device).L2_cache_size)


class Captured:
    """A function on every input set in turn, as one CUDA graph; a call replays it.

    Every set has output buffers of its own, so that each result goes to memory. They are filled
    with NaN before the first replay: what a kernel leaves unwritten is found out.

    Args:
        function: tensors in, a tensor or a tuple of tensors out. It is warmed up (and compiled,
            where it is to be) before the capture.
        sets: its inputs.
    """

    def __init__(
        self, function: Callable[..., Outputs], sets: Sequence[tuple[Tensor, ...]]
    ) -> None:
        import torch

        from ..sessions.cuda_graphs import capturing

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_ROUNDS):
                function(*sets[0])
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with capturing(self._graph):
            self._outputs = [as_tuple(function(*inputs)) for inputs in sets]
        for outputs in self._outputs:
            for tensor in outputs:
                tensor.fill_(math.nan)

    def __call__(self) -> list[tuple[Tensor, ...]]:
        """Replay, asynchronously; returns the outputs of every set."""
        self._graph.replay()
        return self._outputs


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """One output as a tuple of one."""
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 convolutions in float32, on the same cuDNN as otherwise."""
    import torch

    flags = torch.backends.cudnn
    allowed = flags.allow_tf32
    flags.allow_tf32 = False
    try:
        yield
    finally:
        flags.allow_tf32 = allowed


def row_facts(
    seconds: Mapping[str, float], ours: str, work: Demand, ceilings: Ceilings
) -> dict[str, str | float]:
    """What stands in a kernel's row.

    Args:
        seconds: variant → seconds of one call.
        ours: the variant that the row is about.
        work: what one call must do.
        ceilings: of the same run.

    Returns:
        `us`, achieved `GB/s` with its fraction `of copy`, `TFLOP/s` with its fraction `of GEMM`
        where there are operations to count, and `vs <peer>`, how many times as long each other
        variant took.
    """
    time = seconds[ours]
    facts: dict[str, str | float] = {"us": time * 1e6}
    rate = work.bytes / time / 1e9
    facts |= {"GB/s": rate, "of copy": rate / ceilings.copy_gb_s}
    if work.flops:
        rate = work.flops / time / 1e12
        facts |= {"TFLOP/s": rate, "of GEMM": rate / ceilings.gemm_tflop_s}
    facts |= {f"vs {name}": other / time for name, other in seconds.items() if name != ours}
    return facts
