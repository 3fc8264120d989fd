"""Our encoder export beside a plain `torch.onnx.export` of SAM's own module, in one run.

Users of the segment-anything repository export its image encoder as it stands; both files are made
here from the same weights, compared with PyTorch, and timed in turn on ONNX Runtime (CPU).

    python benchmarks/compare_sam_export.py --variant sam_vit_b --precision fp32 --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from rich.console import Console
from rich.table import Table

from dbsam_deploy.cli import HelpFormatter, Parser, run
from dbsam_deploy.core.errors import AccuracyError
from dbsam_deploy.core.imaging import preprocess
from dbsam_deploy.graphs.onnx_export import export_graph
from dbsam_deploy.machine.hardware import describe_hardware
from dbsam_deploy.model.weights import load_model
from dbsam_deploy.recipe import available_precisions, load_recipe
from dbsam_deploy.sessions.onnxruntime_providers import CPU, import_onnxruntime, open_session
from dbsam_deploy.verification.cases import bundled_examples, load_cases
from dbsam_deploy.verification.parity import cosine


class _Plain(torch.nn.Module):
    """The reference encoder, as a module with one tensor in and one out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model.encode(image)


def plain_export(model: torch.nn.Module, image: torch.Tensor, path: Path) -> None:
    """What a user does without this library: trace the stock modules, batch 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Plain(model),
            (image,),
            str(path),
            input_names=["image"],
            output_names=["image_embeddings"],
            opset_version=17,
            dynamo=False,
        )


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python benchmarks/compare_sam_export.py",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--variant", default="sam_vit_b", help="model variant, random weights")
    parser.add_argument("--precision", default="fp32", choices=available_precisions(), help="ours")
    parser.add_argument("--image-size", type=int, help="default: the variant's own")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each, in turn")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the comparison; returns the exit status."""
    options = _parser().parse_args(argv)
    recipe = load_recipe(options.precision)
    loaded = load_model(variant=options.variant, image_size=options.image_size)
    case = load_cases(bundled_examples(), recipe.parity)[0]
    pixels = preprocess(case.image, loaded.preprocessing)
    image = torch.from_numpy(pixels)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        expected = loaded.model.encode(image).numpy()
        plain, ours = Path(scratch) / "plain.onnx", Path(scratch) / "encoder.onnx"
        export_s = {
            "plain": timed(lambda: plain_export(loaded.model, image, plain)),
            "ours": timed(lambda: export_graph(loaded.model, "encoder", recipe, Path(scratch))),
        }
        paths = {"plain": plain, "ours": ours}
        sessions = {
            name: open_session(import_onnxruntime(), str(path), CPU) for name, path in paths.items()
        }
        cosines = {}
        for name, session in sessions.items():
            (found,) = session.run(None, {"image": pixels})
            cosines[name] = cosine(found, expected)
            if not cosines[name] >= recipe.gate.embedding_cosine:
                raise AccuracyError(f"{name}: cosine {cosines[name]:.6f} with PyTorch; not timed")
        seconds: dict[str, list[float]] = {"PyTorch": [], **{name: [] for name in sessions}}
        for _ in range(options.rounds):
            seconds["PyTorch"].append(timed(lambda: loaded.model.encode(image)))
            for name, session in sessions.items():
                seconds[name].append(timed(lambda s=session: s.run(None, {"image": pixels})))
        _print(options, paths, export_s, cosines, seconds)
    return 0


def _print(
    options: argparse.Namespace,
    paths: dict[str, Path],
    export_s: dict[str, float],
    cosines: dict[str, float],
    seconds: dict[str, list[float]],
) -> None:
    machine = describe_hardware()
    table = Table(
        title=f"{options.variant} encoder, batch 1, {machine.cpu}, {machine.cores} cores, "
        f"onnxruntime {import_onnxruntime().__version__}, torch {torch.__version__}"
    )
    for column in ("", "export s", "MiB", "nodes", "cosine", "median s", "min–max s", "vs plain"):
        table.add_column(column, justify="right" if column else "left")
    plain = np.array(seconds["plain"])
    for name, times in seconds.items():
        facts = ["", "", "", ""]
        if name in paths:
            graph = onnx.load(paths[name], load_external_data=False).graph
            facts = [
                f"{export_s[name]:.0f}",
                f"{paths[name].stat().st_size / 2**20:.1f}",
                str(len(graph.node)),
                f"{cosines[name]:.6f}",
            ]
        label = f"ours, {options.precision}" if name == "ours" else name
        ratio = statistics.median(plain / np.array(times))
        spread = f"{min(times):.2f}–{max(times):.2f}"
        table.add_row(label, *facts, f"{statistics.median(times):.2f}", spread, f"{ratio:.2f}×")
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(run(main))
