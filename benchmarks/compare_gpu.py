"""Our image encoder beside what PyTorch's and TensorRT's users run, on one GPU in one run.

examples:
  python benchmarks/compare_gpu.py
  python benchmarks/compare_gpu.py --variants db_sam --batches 1 --rows eager-fp16 ours-fp16
  python benchmarks/compare_gpu.py --calibration FOLDER --rows ours-fp16 trt-plugins trt-int8

Every row is checked before it is timed: its embedding's cosine with PyTorch's in float32. A row
that fails names its error, and the others go on; the status is 1 if one was wrong or failed, not if
it lacks a package, images or memory. Peak memory is that of one call, weights included (engines:
plan and activations). Times are medians of calls in turns, as a caller waits for them. Weights are
random unless the variant comes with trained ones.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing.gpu import peak_bytes, require_cuda, synchronized
from timing.gpu_peers import PeerEncoder, flash_rel_pos_attention, flex_rel_pos_attention
from timing.tensorrt_rows import (
    EngineEncoder,
    ProviderEncoder,
    Workshop,
    build_plan,
    exported_graph,
    provider_session,
    users_graph,
)
from torch import Tensor

from dbsam_deploy.cli import HelpFormatter, Parser, run
from dbsam_deploy.core.errors import DbsamError, InputError, MissingError
from dbsam_deploy.machine.hardware import describe_hardware
from dbsam_deploy.model import VARIANTS, DbSam
from dbsam_deploy.model.weights import load_model
from dbsam_deploy.sessions.cuda_graphs import CudaGraphRecorder, RecordedFunction
from dbsam_deploy.sessions.fused_session import typed_graph
from dbsam_deploy.validation.measuring import take_turns, without_tf32
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
        engine: makes it of exported graphs instead, for a number of images.
    """

    label: str
    dtype: torch.dtype | str
    build: Callable[[DbSam, torch.dtype], Encoder] | None = None
    recorded: bool = False
    engine: Callable[[Workshop, int], Encoder] | None = None


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
    encoder = PeerEncoder(model).to(dtype)
    return torch.compile(encoder, mode="max-autotune", dynamic=False)


def flex(model: DbSam, dtype: torch.dtype) -> Encoder:
    """FlexAttention with PyTorch's own choice of kernels."""
    encoder = PeerEncoder(model, flex_rel_pos_attention).to(dtype)
    return torch.compile(encoder, dynamic=False)


def flex_flash(model: DbSam, dtype: torch.dtype) -> Encoder:
    """FlexAttention on FlashAttention's kernels."""
    encoder = PeerEncoder(model, flash_rel_pos_attention).to(dtype)
    return torch.compile(encoder, dynamic=False)


def ours(model: DbSam, dtype: torch.dtype) -> Encoder:
    """The fused encoder; recorded, it is what backend pytorch-fused runs."""
    return typed_graph(model, "encoder", dtype)


def ours_compiled(model: DbSam, dtype: torch.dtype) -> Encoder:
    """The fused encoder with torch.compile for what lies between its operators."""
    return torch.compile(ours(model, dtype), fullgraph=True, dynamic=False)


def engine(precision: str, plugins: str = "none") -> Callable[[Workshop, int], Encoder]:
    """A TensorRT engine of our export; `plugins` as for `timing.tensorrt_rows.build_plan`."""

    def make(shop: Workshop, batch: int) -> Encoder:
        plan = build_plan(shop, exported_graph(shop, precision), batch, plugins)
        library = shop.library if plugins == "library" else None
        return EngineEncoder(plan, shop.spec, library)

    return make


def users_engine(shop: Workshop, batch: int) -> Encoder:
    """What `torch.onnx.export` and trtexec make of SAM's own modules in float16."""
    plan = build_plan(shop, users_graph(shop, batch), batch, "none")
    return EngineEncoder(plan, shop.spec)


def provider(shop: Workshop, batch: int) -> Encoder:
    """ONNX Runtime's TensorRT provider on our export in float16."""
    session = provider_session(shop, exported_graph(shop, "fp16"), batch)
    return ProviderEncoder(session, shop.spec, batch)


_HALF = torch.float16
ROWS = {
    "eager-fp32": Row("PyTorch eager", torch.float32, eager),
    "eager-fp16": Row("PyTorch eager", torch.float16, eager),
    "compile-fp16": Row("torch.compile", torch.float16, compiled),
    "compile-graphs-fp16": Row("torch.compile, CUDA graphs", torch.float16, compiled_graphs),
    "fast-bf16": Row("segment-anything-fast's recipe", torch.bfloat16, fast_recipe),
    "flex-bf16": Row("FlexAttention, compiled", torch.bfloat16, flex),
    "flex-flash-bf16": Row("FlexAttention FLASH, compiled", torch.bfloat16, flex_flash),
    "ours-fp16": Row("ours", torch.float16, ours, recorded=True),
    "ours-bf16": Row("ours", torch.bfloat16, ours, recorded=True),
    "ours-compile-fp16": Row("ours, compiled", torch.float16, ours_compiled, recorded=True),
    "trt-sam": Row("TensorRT, plain ONNX export", _HALF, recorded=True, engine=users_engine),
    "ort-trt": Row("ONNX Runtime, TensorRT", _HALF, engine=provider),
    "trt-fp32": Row("TensorRT, our export", torch.float32, recorded=True, engine=engine("fp32")),
    "trt-fp16": Row("TensorRT, our export", _HALF, recorded=True, engine=engine("fp16")),
    "trt-plugins": Row(
        "TensorRT, our plugins", _HALF, recorded=True, engine=engine("fp16", "library")
    ),
    "trt-quick": Row(
        "TensorRT, our quick plugins", _HALF, recorded=True, engine=engine("fp16", "quick")
    ),
    "trt-int8": Row("TensorRT, our export", "int8", recorded=True, engine=engine("int8")),
    "trt-int8-plugins": Row(
        "TensorRT, our plugins", "int8", recorded=True, engine=engine("int8", "library")
    ),
    "trt-fp8": Row("TensorRT, our export", "fp8", recorded=True, engine=engine("fp8")),
    "trt-fp8-plugins": Row(
        "TensorRT, our plugins", "fp8", recorded=True, engine=engine("fp8", "library")
    ),
}


@dataclass(frozen=True)
class Result:
    """What a row measured: latency of one call, peak memory, cosine with eager float32."""

    seconds: float
    peak_bytes: int
    cosine: float


@dataclass(frozen=True)
class NoResult:
    """Why a row has none; `wrong` if it failed, and does not merely lack something."""

    reason: str
    wrong: bool


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
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="real images for the rows in int8 and fp8"
    )
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
    variant: str, batch: int, options: argparse.Namespace, folder: Path
) -> tuple[dict[str, Result], dict[str, NoResult]]:
    """Build, check and time the rows of one variant at one batch size.

    Args:
        variant: name of the model.
        batch: images a call.
        options: of the command line.
        folder: for the variant's graphs and engines.

    Returns:
        Row → result, and row → why there is none.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    with torch.inference_mode(False):  # what is exported must not be made in it
        loaded = load_model(variant=variant, image_size=options.image_size)
    shop = Workshop(loaded, folder, options.calibration)
    side = loaded.model.config.image_size
    image = torch.randn(batch, 3, side, side, device=DEVICE)
    with without_tf32():
        expected = _on_device(loaded.model).encode(image).cpu()
    calls: dict[str, Callable[[], Tensor]] = {}
    peaks: dict[str, int] = {}
    cosines: dict[str, float] = {}
    missing: dict[str, NoResult] = {}
    for name in options.rows:
        try:
            call, peak = _prepare(ROWS[name], shop, image)
            found = cosine(call().cpu().numpy(), expected.numpy())
        except Exception as error:  # whatever a row's packages raise, the others are measured
            missing[name] = _no_result(error)
        else:
            if found >= MIN_COSINE:
                calls[name], peaks[name], cosines[name] = call, peak, found
            else:
                why = f"cosine {found:.6f} with eager float32, at least {MIN_COSINE} is expected"
                missing[name] = NoResult(f"{why}; not timed", wrong=True)
        gc.collect()
        torch.cuda.empty_cache()
    timed = {name: synchronized(call) for name, call in calls.items()}
    seconds = take_turns(timed, wall_seconds, rounds=options.rounds) if timed else {}
    return {name: Result(seconds[name], peaks[name], cosines[name]) for name in calls}, missing


def _no_result(error: Exception) -> NoResult:
    """An error in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return NoResult("out of memory", wrong=False)
    if isinstance(error, DbsamError):
        lacks = isinstance(error, MissingError | InputError)
        return NoResult(str(error).splitlines()[0], wrong=not lacks)
    lines = str(error).strip().splitlines() or ["no message"]
    return NoResult(f"{type(error).__name__}: {lines[0]}", not isinstance(error, ImportError))


def _on_device(model: DbSam) -> DbSam:
    """A copy for the row alone: the original stays on the CPU, in float32."""
    return copy.deepcopy(model).to(DEVICE).requires_grad_(False)


def _prepare(row: Row, shop: Workshop, image: Tensor) -> tuple[Callable[[], Tensor], int]:
    """The row's call, and the device memory it takes: its weights and one call's tensors."""
    before = torch.cuda.memory_allocated()
    if row.engine is not None:
        encoder = row.engine(shop, image.shape[0])
    else:
        encoder = row.build(_on_device(shop.loaded.model), row.dtype)
    gc.collect()
    encoder(image)  # compiles, and lets libraries take their workspaces
    held = torch.cuda.memory_allocated() - before + getattr(encoder, "own_bytes", 0)
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
    variant: str, batch: int, results: dict[str, Result], missing: dict[str, NoResult]
) -> None:
    """One table, and why rows are missing; ratios are to torch.compile in float16, if it ran."""
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
    console = Console(width=120)
    console.print(table)
    for name, why in missing.items():
        console.print(f"{name}: {why.reason}", markup=False, highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Print the comparison; returns the exit status."""
    options = _parser().parse_args(argv)
    check_options(options)
    require_cuda("benchmarks/compare_gpu.py")
    wrong = False
    for variant in options.variants:
        with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
            for batch in options.batches:
                results, missing = measure(variant, batch, options, Path(scratch))
                print_table(variant, batch, results, missing)
                wrong = wrong or any(why.wrong for why in missing.values())
    return int(wrong)


if __name__ == "__main__":
    sys.exit(run(main))
