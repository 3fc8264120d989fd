"""The encoder's way from PyTorch to int8 on the CPU, step by step, in one run.

Two exports of one model are run by every CPU backend, in turns on one real image; first each
result is held against the gate of its precision. Two times are shown: on the wall, and of the
processor, which means more on a machine that others use, most of all with --threads 1.

    python -m dbsam_deploy.export --precision fp32 --variant lite_medsam --output build
    python -m dbsam_deploy.export --precision int8 --variant lite_medsam --output build \\
        --calibration FOLDER
    python benchmarks/compare_cpu.py --fp32 build/fp32 --int8 build/int8 --plot waterfall.png
    python benchmarks/compare_cpu.py --fp32 build/fp32 --int8 build/int8 --threads 1 --require 1.6
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

from dbsam_deploy.artefact import Artefact, load_artefact
from dbsam_deploy.cases import bundled_examples, load_cases
from dbsam_deploy.cli import HelpFormatter, Parser, run
from dbsam_deploy.errors import AccuracyError, InputError
from dbsam_deploy.hardware import describe_hardware
from dbsam_deploy.imaging import preprocess
from dbsam_deploy.onnxruntime_providers import CPU, open_session
from dbsam_deploy.openvino_session import OpenvinoSession
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions import OnnxRuntimeSession, PytorchSession
from dbsam_deploy.verify import cosine
from dbsam_deploy.weights import load_model

FloatArray = npt.NDArray[np.float32]
BASE = "ort-fp32"


@dataclass(frozen=True)
class Step:
    """One row.

    Attributes:
        title: in the table and the plot.
        export: `fp32` or `int8`, whose file is run.
        gate: recipe whose gate holds; "" for the reference itself.
        open: (artefact, options) → what runs the encoder.
    """

    title: str
    export: str
    gate: str
    open: Callable[[Artefact, argparse.Namespace], Callable[[FloatArray], FloatArray]]


@dataclass(frozen=True)
class Figure:
    """What was measured of one step; ratios are medians over rounds, `ort-fp32` over this one."""

    name: str
    title: str
    mib: float
    cosine: float
    wall_s: float
    cpu_s: float
    wall_ratio: float
    cpu_ratio: float


def _pytorch(artefact: Artefact, options: argparse.Namespace) -> Callable[[FloatArray], FloatArray]:
    size = artefact.preprocessing.image_size
    loaded = load_model(variant=artefact.variant, checkpoint=options.checkpoint, image_size=size)
    session = PytorchSession(loaded.model)
    return lambda image: session.run("encoder", {"image": image})["image_embeddings"]


def _onnxruntime(artefact: Artefact, options: argparse.Namespace):
    session = OnnxRuntimeSession(artefact, threads=options.threads)
    return lambda image: session.run("encoder", {"image": image})["image_embeddings"]


def _pairs(artefact: Artefact, options: argparse.Namespace):
    path = str(artefact.path("encoder"))
    session = open_session(onnxruntime, path, CPU, threads=options.threads)
    return lambda image: session.run(None, {"image": image})[0]


def _openvino(precision: str):
    def open_step(artefact: Artefact, options: argparse.Namespace):
        session = OpenvinoSession(artefact, precision=precision, threads=options.threads)
        return lambda image: session.run("encoder", {"image": image})["image_embeddings"]

    return open_step


STEPS = {
    "pytorch": Step("PyTorch, eager float32", "fp32", "", _pytorch),
    BASE: Step("ONNX Runtime, float32", "fp32", "fp32", _onnxruntime),
    "ort-int8-pairs": Step("ONNX Runtime, int8, the file as it is", "int8", "int8", _pairs),
    "ort-int8": Step("ONNX Runtime, int8, graph for the CPU", "int8", "int8", _onnxruntime),
    "ov-fp32": Step("OpenVINO, float32", "fp32", "fp32", _openvino("float32")),
    "ov-bf16": Step("OpenVINO, bfloat16", "fp32", "fp16", _openvino("bfloat16")),
    "ov-int8": Step("OpenVINO, int8 and float32", "int8", "int8", _openvino("float32")),
    "ov-int8-bf16": Step("OpenVINO, int8 and bfloat16", "int8", "int8", _openvino("bfloat16")),
}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python benchmarks/compare_cpu.py",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--fp32", type=Path, required=True, help="export in fp32")
    parser.add_argument("--int8", type=Path, required=True, help="export of the same in int8")
    parser.add_argument("--checkpoint", type=Path, help="weights, for the row of PyTorch")
    parser.add_argument(
        "--steps",
        default=",".join(STEPS),
        help="which of them, ort-fp32 among them; a full-size db_sam takes 3 GB for each step "
        "on ONNX Runtime (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each, in turns")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    parser.add_argument("--plot", type=Path, help="file for the picture (.png or .svg)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument(
        "--require",
        type=float,
        help="fail unless the fastest int8 step is this many times as fast as ort-fp32",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the comparison; returns 1 if it misses --require."""
    options = _parser().parse_args(argv)
    names = options.steps.split(",")
    unknown = set(names) - STEPS.keys()
    if unknown or BASE not in names:
        raise InputError(f"--steps {options.steps}: expected {BASE} and some of {', '.join(STEPS)}")
    artefacts = {"fp32": load_artefact(options.fp32), "int8": load_artefact(options.int8)}
    first, second = artefacts.values()
    if (first.variant, first.preprocessing) != (second.variant, second.preprocessing):
        raise InputError(f"{options.fp32} is a {first.variant}, {options.int8} another model")
    if options.threads:
        torch.set_num_threads(options.threads)
    figures = _measure(names, artefacts, options)
    title = _title(first, options)
    _print(title, figures)
    if options.json:
        options.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=2) + "\n")
    if options.plot:
        draw(figures, title, options.plot)
    fastest = max((f.wall_ratio for f in figures if STEPS[f.name].export == "int8"), default=0.0)
    return int(options.require is not None and not fastest >= options.require)


def _measure(
    names: list[str], artefacts: dict[str, Artefact], options: argparse.Namespace
) -> list[Figure]:
    """Check every step, then time them in turns.

    Raises:
        AccuracyError: an embedding below the gate of its precision.
    """
    parity = load_recipe("fp32").parity
    case = load_cases(bundled_examples(), parity)[0]
    image = preprocess(case.image, artefacts["fp32"].preprocessing)
    works = {n: STEPS[n].open(artefacts[STEPS[n].export], options) for n in names}
    reference = works[BASE](image)
    cosines = {}
    for name, work in works.items():
        cosines[name] = cosine(work(image), reference)
        gate = load_recipe(STEPS[name].gate or "fp32").gate
        if not cosines[name] >= gate.embedding_cosine:
            raise AccuracyError(
                f"{name}: cosine {cosines[name]:.5f} with {BASE}, the gate is "
                f"{gate.embedding_cosine}; not timed"
            )
    wall: dict[str, list[float]] = {name: [] for name in names}
    busy: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, work in works.items():
            start, begun = time.perf_counter(), time.process_time()
            work(image)
            wall[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - begun)
    return [
        Figure(
            name,
            STEPS[name].title,
            artefacts[STEPS[name].export].path("encoder").stat().st_size / 2**20,
            cosines[name],
            statistics.median(wall[name]),
            statistics.median(busy[name]),
            statistics.median(np.array(wall[BASE]) / wall[name]),
            statistics.median(np.array(busy[BASE]) / busy[name]),
        )
        for name in names
    ]


def _title(artefact: Artefact, options: argparse.Namespace) -> str:
    machine = describe_hardware()
    threads = options.threads or machine.cores
    return (
        f"{artefact.variant} encoder, {artefact.preprocessing.image_size} px, batch 1, "
        f"{machine.cpu}, {threads} thread{'s' * (threads > 1)}"
    )


def _print(title: str, figures: list[Figure]) -> None:
    table = Table(title=title)
    for column in ("", "MiB", "cosine", "wall s", "CPU s", "faster (wall)", "faster (CPU)"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for f in figures:
        seconds = (
            f"{f.wall_s:.3f}",
            f"{f.cpu_s:.3f}",
            f"{f.wall_ratio:.2f}×",
            f"{f.cpu_ratio:.2f}×",
        )
        size = "" if f.name == "pytorch" else f"{f.mib:.1f}"
        table.add_row(f.title, size, f"{f.cosine:.6f}", *seconds)
    Console(width=140).print(table)


def draw(figures: list[Figure], title: str, path: Path) -> None:
    """Bars of the processor's time, the first step on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.6 + 0.45 * len(figures)), layout="constrained")
    colours = ["#1f6f8b" if STEPS[f.name].export == "int8" else "#9aa5ab" for f in figures]
    bars = axes.barh([f.title for f in figures], [f.cpu_s for f in figures], color=colours)
    axes.bar_label(bars, [f"{f.cpu_s:.2f} s   {f.cpu_ratio:.2f}×" for f in figures], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel("processor time of one image, seconds; × as fast as ONNX Runtime in float32")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run(main))
