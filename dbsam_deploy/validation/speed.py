"""Times, and the ceilings they are held against, measured in the same process.

On a GPU the fused kernels are timed; on a CPU PyTorch's own form of the operators, since the
emulation computes thread by thread. What is timed is compared with the reference first.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..artefact import Artefact, load_artefact
from ..core.contract import BOXES
from ..core.graph_imaging import encoder_feed
from ..engines.device import find_gpu
from ..kernels import library as kernels
from ..sessions.session import Session
from .measuring import (
    Captured,
    Ceilings,
    CudaStopwatch,
    Demand,
    Stopwatch,
    as_tuple,
    cache_bytes,
    measure_ceilings,
    row_facts,
    sets_needed,
    take_turns,
)
from .operator_cases import FULL, OperatorCase, draw, expected
from .operators import need_cuda, share_of
from .runtimes import RUNTIMES
from .verdicts import CheckFunction, Context, NotRunError, Passed, need_package

ON_CPU = ("full map", "64×64 map", "25 windows", "windowed map", "hidden map")
"""Cases that a CPU takes well under a second for."""
CPU_ROUNDS, CPU_DIVIDE = 3, 8


def _wall(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@functools.cache
def _measured() -> tuple[Stopwatch, Ceilings]:
    """The stopwatch of this machine's device, and its ceilings."""
    if find_gpu() is not None:
        need_cuda()
        watch = CudaStopwatch()
        return watch, measure_ceilings(watch)
    return _wall, measure_ceilings(_wall, device="cpu", dtype="float32", divide=CPU_DIVIDE)


def ceilings(context: Context) -> Passed:
    """Copy bandwidth and GEMM rate.

    Raises:
        NotRunError: no PyTorch, or none that uses the GPU.
    """
    need_package("torch", "export")
    found, gpu = _measured()[1], find_gpu()
    what = "bfloat16" if gpu else "float32"
    where = gpu.name if gpu else "this CPU"
    return Passed(
        f"{where}: {found.copy_gb_s:.4g} GB/s copied (read + written), "
        f"{found.gemm_tflop_s:.3g} TFLOP/s in a {what} GEMM",
        {"copy_gb_s": found.copy_gb_s, "gemm_tflop_s": found.gemm_tflop_s},
    )


def time_operator(operator: str, context: Context) -> Passed:
    """An operator's time at DB-SAM's shapes, and its share of the ceiling that is nearer.

    Raises:
        NotRunError: no PyTorch, or none that uses the GPU.
        AccuracyError: a result beyond its bound, which is not timed.
    """
    need_package("torch", "export")
    on_gpu = find_gpu() is not None
    rows = {
        name: _row(case, on_gpu=on_gpu)
        for name, case in FULL.items()
        if case.operator == operator and (on_gpu or name in ON_CPU)
    }
    if not rows:
        raise NotRunError(f"no shape of {operator} is timed {'' if on_gpu else 'on a CPU'}")
    shares = {name: max(row["of copy"], row.get("of GEMM", 0.0)) for name, row in rows.items()}
    texts = [f"{name} {rows[name]['us']:.4g} µs, {share:.0%}" for name, share in shares.items()]
    what = "fused, float16" if on_gpu else "PyTorch's own form, float32"
    return Passed(
        f"{what}; time and share of the ceiling: {'; '.join(texts)}",
        {"rows": rows, "share_of_ceiling": shares, "what": what},
    )


def _row(case: OperatorCase, *, on_gpu: bool) -> dict[str, Any]:
    from ..kernels import torch_ops

    watch, limits = _measured()
    dtype = "float16" if on_gpu else "float32"
    itemsize = 2 if on_gpu else 4
    work = Demand(case.elements * itemsize, case.flops)
    count = sets_needed(work.bytes, cache_bytes()) if on_gpu else 1
    device = "cuda" if on_gpu else "cpu"
    sets = [tuple(t.to(device) for t in draw(case, dtype, seed=i)) for i in range(count)]
    function = partial(getattr(torch_ops, case.operator), **case.sizes)
    if on_gpu:
        work_once: Callable[[], Any] = Captured(function, sets)
        found = work_once()
    else:
        work_once = partial(function, *sets[0])
        found = [as_tuple(work_once())]
    for inputs, outputs in zip(sets, found, strict=True):
        share_of(outputs, expected(case, inputs), dtype, "the timed result")
    seconds = take_turns({"ours": work_once}, watch, rounds=30 if on_gpu else CPU_ROUNDS)
    return row_facts({"ours": seconds["ours"] / count}, "ours", work, limits)


def time_runtime(name: str, context: Context) -> Passed:
    """An image, one box and eight boxes on a runtime: medians of calls in turns.

    Raises:
        NotRunError: the runtime or the export is not here.
    """
    artefact = load_artefact(context.find_artefact())
    return time_session(artefact, RUNTIMES[name](artefact))


def time_session(artefact: Artefact, session: Session) -> Passed:
    """An image, one box and eight boxes on an open session, see `time_runtime`."""
    side, rng = artefact.preprocessing.image_size, np.random.default_rng(0)
    drawn = rng.integers(0, 256, (side, side, 3), np.uint8)
    image = encoder_feed(drawn, artefact.preprocessing)
    features = session.run("encoder", image)
    corners = np.sort(rng.uniform(0, side, (1, 8, 2, 2)), axis=2)
    boxes = corners.reshape(1, 8, 4).astype(np.float32)
    work = {
        "encoding": partial(session.run, "encoder", image),
        "1 box": partial(session.run, "decoder", {**features, BOXES: boxes[:, :1]}),
        "8 boxes": partial(session.run, "decoder", {**features, BOXES: boxes}),
    }
    seconds = take_turns(work, _wall, rounds=7)
    times = {f"{what}_ms": 1000 * value for what, value in seconds.items()}
    text = ", ".join(f"{what} {1000 * value:.4g} ms" for what, value in seconds.items())
    return Passed(f"{artefact.variant} {artefact.precision}, {side} px: {text}", times)


SPEED: dict[str, CheckFunction] = {
    "ceilings": ceilings,
    **{name: partial(time_operator, name) for name in kernels.OPERATORS},
    **{name: partial(time_runtime, name) for name in RUNTIMES},
}
