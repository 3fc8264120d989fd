"""The encoder's way from PyTorch to int8 on the CPU, step by step, in one run.

Two exports of one model are run by every CPU backend. First each one's masks of real images are
held against those of the float32 export on ONNX Runtime and the gate of its precision; a step that
misses it is listed, not timed. Then the encoders run on one image in turns. Two times are shown:
on the wall, and of the processor, which means more on a machine that others use, most of all with
--threads 1.

    python -m dbsam_deploy.export --precision fp32 --variant lite_medsam --output build
    python -m dbsam_deploy.export --precision int8 --variant lite_medsam --output build \\
        --calibration FOLDER
    python benchmarks/compare_cpu.py --fp32 build/fp32 --int8 build/int8 --plot waterfall.png
    python benchmarks/compare_cpu.py --fp32 build/fp32 --int8 build/int8 --data FOLDER \\
        --data-images 84 --require 1.6
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dbsam_deploy.artefact import Artefact, load_artefact
from dbsam_deploy.cli import HelpFormatter, Parser, progress_bars, run
from dbsam_deploy.core.contract import graph_specs
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import FloatArray, preprocess
from dbsam_deploy.machine.hardware import describe_hardware
from dbsam_deploy.model.weights import load_model
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions.onnxruntime_providers import CPU, import_onnxruntime, open_session
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.sessions.openvino_session import OpenvinoSession
from dbsam_deploy.sessions.pytorch_session import PytorchSession
from dbsam_deploy.sessions.session import Feed, Session
from dbsam_deploy.verification.cases import Case, bundled_examples, load_cases
from dbsam_deploy.verification.parity import Figures, compare, misses

BASE = "ort-fp32"


@dataclass(frozen=True)
class Step:
    """One row.

    Attributes:
        title: in the table and the plot.
        export: `fp32` or `int8`, whose files are run.
        gate: recipe whose gate holds.
        open: (artefact, options) → session.
    """

    title: str
    export: str
    gate: str
    open: Callable[[Artefact, argparse.Namespace], Session]


@dataclass(frozen=True)
class Timing:
    """Medians over rounds; ratios are `ort-fp32` over this one."""

    wall_s: float
    cpu_s: float
    wall_ratio: float
    cpu_ratio: float


@dataclass(frozen=True)
class Row:
    """What was measured of one step; `timing` is None if `missed` names figures below the gate."""

    name: str
    title: str
    mib: float
    figures: Figures
    missed: list[str]
    timing: Timing | None


class _Remembered:
    """A session that computes each image's embedding once: every step is held against it."""

    def __init__(self, session: Session) -> None:
        self.session, self.backend = session, session.backend
        self._embeddings: dict[bytes, dict[str, FloatArray]] = {}

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        if graph != "encoder":
            return self.session.run(graph, feed)
        key = feed["image"].tobytes()
        if key not in self._embeddings:
            self._embeddings[key] = self.session.run(graph, feed)
        return self._embeddings[key]


class _Pairs:
    """ONNX Runtime on the published encoder as it is, as a Triton server opens it."""

    backend = "onnxruntime-cpu"

    def __init__(self, artefact: Artefact, threads: int) -> None:
        path = str(artefact.path("encoder"))
        self._encoder = open_session(import_onnxruntime(), path, CPU, threads=threads)
        self._names = graph_specs(artefact.preprocessing)["encoder"].output_names
        self._others = OnnxRuntimeSession(artefact, threads=threads)

    def run(self, graph: str, feed: Feed) -> dict[str, FloatArray]:
        if graph != "encoder":
            return self._others.run(graph, feed)
        return dict(zip(self._names, self._encoder.run(self._names, feed), strict=True))


def _pytorch(artefact: Artefact, options: argparse.Namespace) -> Session:
    size = artefact.preprocessing.image_size
    loaded = load_model(variant=artefact.variant, checkpoint=options.checkpoint, image_size=size)
    return PytorchSession(loaded.model)


def _onnxruntime(artefact: Artefact, options: argparse.Namespace) -> Session:
    return OnnxRuntimeSession(artefact, threads=options.threads)


def _pairs(artefact: Artefact, options: argparse.Namespace) -> Session:
    return _Pairs(artefact, options.threads)


def _openvino(precision: str) -> Callable[[Artefact, argparse.Namespace], Session]:
    return lambda artefact, options: OpenvinoSession(
        artefact, precision=precision, threads=options.threads, cache=options.cache
    )


STEPS = {
    "pytorch": Step("PyTorch, eager float32", "fp32", "fp32", _pytorch),
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
        help="which of them, ort-fp32 among them; a full-size db_sam takes up to 6 GB for each "
        "step (default: all)",
    )
    parser.add_argument(
        "--data", type=Path, help="folder of npz with imgs and gts (default: the bundled images)"
    )
    parser.add_argument("--data-images", type=int, help="images compared (default: the recipe's)")
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
    with tempfile.TemporaryDirectory() as cache:  # not beside the exports: those stay as they are
        options.cache = Path(cache)
        return _run(options)


def _run(options: argparse.Namespace) -> int:
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
    parity = load_recipe("fp32").parity
    if options.data_images is not None:
        parity = replace(parity, images=options.data_images)
    cases = load_cases(options.data or bundled_examples(), parity)
    sessions = {n: STEPS[n].open(artefacts[STEPS[n].export], options) for n in names}
    with progress_bars(Console(stderr=True)) as bars:
        figures = _compare(sessions, first, cases, bars)
        missed = {n: misses(f, load_recipe(STEPS[n].gate).gate) for n, f in figures.items()}
        kept = {name: session for name, session in sessions.items() if not missed[name]}
        timings = _time(kept, first, cases[0], options.rounds, bars)
    sizes = {k: a.path("encoder").stat().st_size / 2**20 for k, a in artefacts.items()}
    rows = [
        Row(n, STEPS[n].title, sizes[STEPS[n].export], figures[n], missed[n], timings.get(n))
        for n in names
    ]
    _report(_title(first, options), rows, options)
    ratios = [r.timing.wall_ratio for r in rows if r.timing and STEPS[r.name].export == "int8"]
    return int(options.require is not None and not max(ratios, default=0.0) >= options.require)


def _compare(
    sessions: dict[str, Session], artefact: Artefact, cases: list[Case], bars: Progress
) -> dict[str, Figures]:
    """Each step's masks beside those of `ort-fp32`."""
    reference = _Remembered(sessions[BASE])
    figures = {}
    task = bars.add_task("", total=len(sessions) * len(cases))
    for name, session in sessions.items():
        bars.update(task, description=f"comparing {name}")
        figures[name] = compare(
            reference,
            session,
            artefact.preprocessing,
            cases,
            progress=lambda case: bars.advance(task),
        )
    return figures


def _time(
    sessions: dict[str, Session], artefact: Artefact, case: Case, rounds: int, bars: Progress
) -> dict[str, Timing]:
    """Time the encoders in turns on one image; each has run before."""
    if BASE not in sessions:
        return {}  # the reference does not repeat itself: there is nothing to relate times to
    feed: Feed = {"image": preprocess(case.image, artefact.preprocessing)}
    wall: dict[str, list[float]] = {name: [] for name in sessions}
    busy: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in bars.track(range(rounds), description="timing"):
        for name, session in sessions.items():
            start, begun = time.perf_counter(), time.process_time()
            session.run("encoder", feed)
            wall[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - begun)
    return {
        name: Timing(
            statistics.median(wall[name]),
            statistics.median(busy[name]),
            statistics.median(np.array(wall[BASE]) / wall[name]),
            statistics.median(np.array(busy[BASE]) / busy[name]),
        )
        for name in sessions
    }


def _title(artefact: Artefact, options: argparse.Namespace) -> str:
    machine = describe_hardware()
    threads = options.threads or machine.cores
    return (
        f"{artefact.variant} encoder, {artefact.preprocessing.image_size} px, batch 1, "
        f"{machine.cpu}, {threads} thread{'s' * (threads > 1)}"
    )


def _report(title: str, rows: list[Row], options: argparse.Namespace) -> None:
    _print(title, rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if options.plot:
        draw(rows, title, options.plot)


def _print(title: str, rows: list[Row]) -> None:
    figures = rows[0].figures
    table = Table(
        title=title,
        caption="cosine (smallest), agreement of masks (mean / 5th percentile) and loss of Dice "
        f"with the truth beside {STEPS[BASE].title}: {figures.images} images, {figures.objects} "
        "objects",
    )
    columns = ("MiB", "cosine", "agreement", "Dice drop", "wall s", "CPU s", "faster", "(CPU)")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        f, t = row.figures, row.timing
        table.add_row(
            row.title,
            "" if row.name == "pytorch" else f"{row.mib:.1f}",
            f"{f.embedding_cosine:.5f}",
            f"{f.mask_agreement_mean:.4f} / {f.mask_agreement_p5:.4f}",
            f"{f.dice_drop:.4f}",
            *(("misses its gate", "", "", "") if t is None else _cells(t)),
        )
    console = Console(width=150)
    console.print(table)
    for row in rows:
        if row.missed:
            console.print(f"{row.title}: {'; '.join(row.missed)}; not timed", highlight=False)


def _cells(t: Timing) -> tuple[str, ...]:
    return (f"{t.wall_s:.3f}", f"{t.cpu_s:.3f}", f"{t.wall_ratio:.2f}×", f"{t.cpu_ratio:.2f}×")


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Bars of the processor's time, the first step on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [(row, row.timing) for row in rows if row.timing]
    figure, axes = pyplot.subplots(figsize=(9, 0.6 + 0.45 * len(timed)), layout="constrained")
    colours = ["#1f6f8b" if STEPS[row.name].export == "int8" else "#9aa5ab" for row, _ in timed]
    bars = axes.barh([row.title for row, _ in timed], [t.cpu_s for _, t in timed], color=colours)
    axes.bar_label(bars, [f"{t.cpu_s:.2f} s   {t.cpu_ratio:.2f}×" for _, t in timed], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel("processor time of one image, seconds; × as fast as ONNX Runtime in float32")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run(main))
