"""Our image encoder beside what PyTorch users run, on one GPU in one run.

examples:
  python benchmarks/compare_gpu.py
  python benchmarks/compare_gpu.py --variants db_sam --batches 1 --rows eager-fp16 ours-fp16

Every row is checked before it is timed: its embedding's cosine with PyTorch's in float32. Peak
memory is that of one call, weights included. Times are medians of calls in turns, as a caller
waits for them. Weights are random unless the variant comes with trained ones.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from timing.gpu import peak_bytes, require_cuda, synchronized, take_turns, without_tf32
from timing.gpu_peers import SdpaEncoder
from torch import Tensor

from dbsam_deploy.cli import HelpFormatter, Parser, run
from dbsam_deploy.core.errors import AccuracyError, InputError
from dbsam_deploy.machine.hardware import describe_hardware
from dbsam_deploy.model import VARIANTS, DbSam
from dbsam_deploy.model.weights import load_model
from dbsam_deploy.sessions.cuda_graphs import CudaGraphRecorder, RecordedFunction
from dbsam_deploy.sessions.fused_session import typed_graph
from dbsam_deploy.verification.parity import cosine

DEVICE = "cuda"
Encoder = Callable[[Tensor], Tensor]
MIN_COSINE = 0.99
"""Below it a row computes something else: it is an error, not a result."""


@dataclass(frozen=True)
class Row:
    """One way to run the encoder.

    Attributes:
        label: what it is, for the table.
        dtype: of weights and activations.
        build: model on the GPU → image (B, 3, S, S) float32 to embedding.
        recorded: whether it is replayed as a CUDA graph of ours.
    """

    label: str
    dtype: torch.dtype
    build: Callable[[DbSam, torch.dtype], Encoder]
    recorded: bool = False


def eager(model: DbSam, dtype: torch.dtype) -> Encoder:
    """The reference model's own modules."""
    model = model.to(dtype)
    return lambda image: model.encode(image.to(dtype)).float()


def compiled(model: DbSam, dtype: torch.dtype, mode: str | None = None) -> Encoder:
    """The same under torch.compile."""
    model = model.to(dtype)
    encode = torch.compile(model.encode, mode=mode, dynamic=False)
    return lambda image: encode(image.to(dtype)).float()


def compiled_graphs(model: DbSam, dtype: torch.dtype) -> Encoder:
    """The same with torch.compile's own CUDA graphs."""
    return compiled(model, dtype, "reduce-overhead")


def fast_recipe(model: DbSam, dtype: torch.dtype) -> Encoder:
    """segment-anything-fast: bfloat16, SDPA with the bias as mask, mode max-autotune."""
    encoder = SdpaEncoder(model).to(dtype)
    return torch.compile(encoder, mode="max-autotune", dynamic=False)


def ours(model: DbSam, dtype: torch.dtype) -> Encoder:
    """The fused encoder; recorded, it is what backend pytorch-fused runs."""
    return typed_graph(model, "encoder", dtype)


def ours_compiled(model: DbSam, dtype: torch.dtype) -> Encoder:
    """The fused encoder with torch.compile for what lies between its operators."""
    return torch.compile(ours(model, dtype), fullgraph=True, dynamic=False)


ROWS = {
    "eager-fp32": Row("PyTorch eager", torch.float32, eager),
    "eager-fp16": Row("PyTorch eager", torch.float16, eager),
    "compile-fp16": Row("torch.compile", torch.float16, compiled),
    "compile-graphs-fp16": Row("torch.compile, CUDA graphs", torch.float16, compiled_graphs),
    "fast-bf16": Row("segment-anything-fast's recipe", torch.bfloat16, fast_recipe),
    "ours-fp16": Row("ours", torch.float16, ours, recorded=True),
    "ours-bf16": Row("ours", torch.bfloat16, ours, recorded=True),
    "ours-compile-fp16": Row("ours, compiled", torch.float16, ours_compiled, recorded=True),
}


@dataclass(frozen=True)
class Result:
    """What a row measured: latency of one call, peak memory, cosine with eager float32."""

    seconds: float
    peak_bytes: int
    cosine: float


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python benchmarks/compare_gpu.py",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--variants", nargs="+", default=["sam_vit_b", "db_sam", "db_sam_plus"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--image-size", type=int, help="default: the variant's own")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each, in turn")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuse what is not on the lists before anything is built.

    Raises:
        InputError: an unknown variant or row, or a number below 1.
    """
    for what, given, known in (
        ("variant", options.variants, VARIANTS),
        ("row", options.rows, ROWS),
    ):
        for name in given:
            if name not in known:
                raise InputError(f"{what} {name!r}: expected one of {', '.join(known)}")
    if min(*options.batches, options.rounds, 1) < 1:
        raise InputError("--batches and --rounds: expected numbers of at least 1")


def measure(
    variant: str, batch: int, options: argparse.Namespace
) -> tuple[dict[str, Result], dict[str, str]]:
    """Build, check and time the rows of one variant at one batch size.

    Returns:
        Row → result, and row → why there is none.

    Raises:
        AccuracyError: a row whose embedding is another one.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    model = load_model(variant=variant, image_size=options.image_size).model
    side = model.config.image_size
    image = torch.randn(batch, 3, side, side, device=DEVICE)
    with without_tf32():
        expected = _on_device(model).encode(image).cpu()
    calls: dict[str, Callable[[], Tensor]] = {}
    peaks: dict[str, int] = {}
    missing: dict[str, str] = {}
    for name in options.rows:
        try:
            calls[name], peaks[name] = _prepare(ROWS[name], model, image)
        except torch.OutOfMemoryError:
            missing[name] = "out of memory"
        gc.collect()
        torch.cuda.empty_cache()
    cosines = {name: cosine(call().cpu().numpy(), expected.numpy()) for name, call in calls.items()}
    for name, found in cosines.items():
        if not found >= MIN_COSINE:
            raise AccuracyError(
                f"{variant}, batch {batch}, {name}: cosine {found:.6f} with eager float32, "
                f"expected at least {MIN_COSINE}; not timed"
            )
    timed = {name: synchronized(call) for name, call in calls.items()}
    seconds = take_turns(timed, wall_seconds, rounds=options.rounds) if timed else {}
    return {name: Result(seconds[name], peaks[name], cosines[name]) for name in calls}, missing


def _on_device(model: DbSam) -> DbSam:
    """A copy for the row alone: the original stays on the CPU, in float32."""
    return copy.deepcopy(model).to(DEVICE).requires_grad_(False)


def _prepare(row: Row, model: DbSam, image: Tensor) -> tuple[Callable[[], Tensor], int]:
    """The row's call, and the device memory it takes: its weights and one call's tensors."""
    before = torch.cuda.memory_allocated()
    encoder = row.build(_on_device(model), row.dtype)
    gc.collect()
    encoder(image)  # compiles, and lets libraries take their workspaces
    held = torch.cuda.memory_allocated() - before
    peak = held + peak_bytes(encoder, image)
    if not row.recorded:
        return lambda: encoder(image), peak
    recorded = RecordedFunction(
        lambda x: (encoder(x),), CudaGraphRecorder(), device=torch.device(DEVICE)
    )
    return lambda: recorded(image)[0], peak


def wall_seconds(work: Callable[[], object]) -> float:
    """What a caller waits for; `work` returns when the device is done."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def print_table(
    variant: str, batch: int, results: dict[str, Result], missing: dict[str, str]
) -> None:
    """One table; ratios are to torch.compile in float16, where that row ran."""
    machine = describe_hardware()
    table = Table(
        title=f"{variant} encoder, batch {batch}, {machine.gpu}, driver {machine.driver}, "
        f"torch {torch.__version__}"
    )
    columns = ("", "dtype", "ms", "images/s", "peak GB", "cosine", "vs torch.compile")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    base = results.get("compile-fp16")
    for name, row in ROWS.items():
        dtype = str(row.dtype).removeprefix("torch.")
        if name in missing:
            table.add_row(row.label, dtype, missing[name])
        if name not in results:
            continue
        result = results[name]
        table.add_row(
            row.label,
            dtype,
            f"{result.seconds * 1e3:.2f}",
            f"{batch / result.seconds:.1f}",
            f"{result.peak_bytes / 1e9:.2f}",
            f"{result.cosine:.6f}",
            f"{base.seconds / result.seconds:.2f}×" if base else "–",
        )
    Console(width=120).print(table)


def main(argv: list[str] | None = None) -> int:
    """Print the comparison; returns the exit status."""
    options = _parser().parse_args(argv)
    check_options(options)
    require_cuda("benchmarks/compare_gpu.py")
    with torch.inference_mode():
        for variant in options.variants:
            for batch in options.batches:
                print_table(variant, batch, *measure(variant, batch, options))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
