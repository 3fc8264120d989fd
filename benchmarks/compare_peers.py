"""What people run on a CPU beside what we give them: SAM ViT-B and LiteMedSAM, in one run.

Each way has a process of its own, one after the other, again and again: from the start of Python to
the first mask, an image, one box and 32 boxes on a known image, 20 slices with a box each, memory,
files. First its masks of the same 32 boxes are held against those of the model's own code in
PyTorch, by a gate for how it rounds (`Way.gate`); a way that misses it is listed, not timed.
Threads are what each library takes by itself.

    pip install --no-deps samexporter==0.5.0 nncf==3.4.0  # else their ways are listed, not timed
    python benchmarks/compare_peers.py --model lite_medsam --checkpoint lite_medsam.pth --work W
    python benchmarks/compare_peers.py --model sam_vit_b --work W --plot peers.png

Without --checkpoint SAM's encoder has random weights, with a trained decoder (LiteMedSAM's fits) by
--decoder-weights: masks follow the box, times are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from timing.peers import LITE, SAM, SLICES, WAYS, Way

from dbsam_deploy.cli import HelpFormatter, Parser, progress_bars, run
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.npz_files import read_images
from dbsam_deploy.machine.hardware import describe_hardware
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.verification.cases import bundled_examples
from dbsam_deploy.verification.parity import dice

PICTURE = "Microscopy_nuclei_HE_0e21d7b3eea8.npz"
BOXES = 32
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Row:
    """What was found of one way; `missed` says why it was not timed."""

    title: str
    mib_on_disk: float = 0.0
    agreement_mean: float = 0.0
    agreement_p5: float = 0.0
    missed: str = ""
    runs: list[dict[str, float]] = field(default_factory=list)

    @property
    def figures(self) -> dict[str, float]:
        """Medians over the runs: seconds, and MiB of memory."""
        return {name: float(np.median([one[name] for one in self.runs])) for name in self.runs[0]}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python benchmarks/compare_peers.py",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--model", choices=(LITE, SAM), default=LITE, help="which model")
    parser.add_argument("--checkpoint", type=Path, help="its weights (for sam_vit_b: random ones)")
    parser.add_argument("--decoder-weights", type=Path, help="a trained decoder for random SAM")
    parser.add_argument("--calibration", type=Path, help="folder of npz for the ways in int8")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps exports")
    parser.add_argument("--ways", help="some of them, by their names, with commas (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each, in turns")
    parser.add_argument("--rounds", type=int, default=3, help="questions of a kind in each")
    parser.add_argument("--slices", type=int, default=SLICES, help="of the volume")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="file for the picture (.png or .svg)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the comparison; returns 1 if one of ours missed its gate."""
    options = _parser().parse_args(argv)
    names = [name for name, way in WAYS.items() if way.model == options.model]
    if options.ways:
        asked = options.ways.split(",")
        if not set(asked) <= set(names):
            raise InputError(f"--ways {options.ways}: expected some of {', '.join(names)}")
        names = [name for name in names if name in asked or name == names[0]]
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint = options.checkpoint or _random_sam(options)
    rows = {name: Row(WAYS[name].title) for name in names}
    with progress_bars(Console(stderr=True)) as bars, tempfile.TemporaryDirectory() as scratch:
        question = _question(Path(scratch))
        for name in bars.track(names, description="exports"):
            rows[name].missed = _prepare(name, checkpoint, options)
            rows[name].mib_on_disk = _mib(_folder(name, options.work))
        turns = [name for _ in range(options.repeats) for name in names]
        masks: dict[str, npt.NDArray[np.uint8]] = {}
        for name in bars.track(turns, description="asking"):
            if not rows[name].missed:
                _ask(name, rows[name], question, masks, options)
    _print(options, rows)
    if options.json:
        body = {
            "hardware": asdict(describe_hardware()),
            "rows": {n: asdict(r) for n, r in rows.items()},
        }
        options.json.write_text(json.dumps(body, indent=2) + "\n")
    if options.plot:
        draw(options.model, list(rows.values()), options.plot)
    return int(any(row.missed for name, row in rows.items() if "-ours" in name))


def _random_sam(options: argparse.Namespace) -> Path:
    """Weights of SAM's ViT-B from a fixed seed, as its own file has them.

    Raises:
        InputError: another model, whose masks would say nothing.
    """
    if options.model != SAM:
        raise InputError(f"--model {options.model} needs --checkpoint FILE")
    path: Path = options.work / "sam_vit_b_random.pth"
    if not path.exists():
        import torch

        from dbsam_deploy.model.weights import load_model

        loaded = load_model(variant=SAM, decoder_weights=options.decoder_weights)
        torch.save(loaded.model.state_dict(), path)
    return path


def _question(folder: Path) -> Path:
    """An H&E image and 32 boxes: each nucleus's own, then the same a little larger."""
    path = bundled_examples() / PICTURE
    image = read_images(path)[0]
    with np.load(path) as file:
        labels = np.squeeze(file["gts"])
    boxes = []
    for label in np.unique(labels[labels > 0]):
        y, x = np.nonzero(labels == label)
        boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    found = np.array(boxes, np.float32)
    height, width = labels.shape
    grown = found + np.array([-3, -3, 3, 3], np.float32)
    larger = np.clip(grown, 0, np.array([width, height, width, height], np.float32))
    both = np.concatenate([found, larger])[:BOXES]
    np.savez(folder / "question.npz", image=image, boxes=both)
    return folder / "question.npz"


def _folder(name: str, work: Path) -> Path:
    return work / (WAYS[name].files or name)


def _prepare(name: str, checkpoint: Path, options: argparse.Namespace) -> str:
    """Make a way's files, unless they are there; what went wrong, if something did."""
    folder = _folder(name, options.work)
    if folder.is_dir():
        return ""
    unfinished = folder.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    words = [name, unfinished, "--prepare", checkpoint.resolve()]
    if options.calibration:
        words += ["--calibration", options.calibration.resolve()]
    done = _child(words)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    unfinished.rename(folder)
    return ""


def _child(words: list[object]) -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))
    places += os.pathsep + os.environ.get("PYTHONPATH", "")
    return subprocess.run(
        [sys.executable, "-m", "timing.peers", *map(str, words)],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
        check=False,
    )


def _mib(folder: Path) -> float:
    """Without the copy for a server, which the others do not make."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix in WEIGHTS]
    own = [path for path in files if not path.relative_to(folder).parts[0].startswith(SERVED)]
    return sum(path.stat().st_size for path in own) / 2**20


SERVED = "model_repository_"
WEIGHTS = {".onnx", ".data", ".pth", ".xml", ".bin"}


def _ask(
    name: str,
    row: Row,
    question: Path,
    masks: dict[str, npt.NDArray[np.uint8]],
    options: argparse.Namespace,
) -> None:
    """One process of a way; its first one's masks are judged."""
    out = question.with_name(f"{name}.json")
    counts = ["--rounds", options.rounds, "--slices", options.slices]
    words = [name, _folder(name, options.work), "--question", question, "--out", out, *counts]
    done = _child([*words, "--started", time.time()])
    if done.returncode:
        row.missed = done.stderr.strip().splitlines()[-1]
        return
    if name not in masks:
        with np.load(out.with_suffix(".npz")) as file:
            masks[name] = file["masks"]
        row.missed = _judge(row, WAYS[name], masks[name], next(iter(masks.values())))
    answer = json.loads(out.read_text())
    row.runs.append({**answer["seconds"], "MiB": answer["peak_mib"]})


def _judge(
    row: Row, way: Way, masks: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8]
) -> str:
    """Set the agreement with PyTorch's masks; what is below the gate, if something is."""
    empty = sum(not mask.any() for mask in expected)
    if 2 * empty > len(expected):
        return f"{empty} of the {len(expected)} masks are empty in PyTorch: name other weights"
    found = list(map(dice, masks, expected))
    row.agreement_mean, row.agreement_p5 = float(np.mean(found)), float(np.percentile(found, 5))
    gate = load_recipe(way.gate).gate
    reached = (row.agreement_mean, row.agreement_p5)
    wanted = (gate.mask_agreement_mean, gate.mask_agreement_p5)
    if all(a >= b for a, b in zip(reached, wanted, strict=True)):
        return ""
    return "agreement {:.4f} / {:.4f}, its gate {:.4f} / {:.4f}".format(*reached, *wanted)


def _print(options: argparse.Namespace, rows: dict[str, Row]) -> None:
    machine = describe_hardware()
    table = Table(
        title=f"{options.model}, {machine.cpu}, {machine.cores} cores, medians of "
        f"{options.repeats} processes",
        caption="seconds; agreement of 32 masks with the first row's, mean / 5th percentile",
    )
    timed = [row for row in rows.values() if not row.missed]
    columns = list(timed[0].figures) if timed else []
    table.add_column("", no_wrap=True)
    for column in ("agreement", "MiB on disk", *columns[:-1], "peak MiB"):
        table.add_column(column, justify="right")
    for row in timed:
        agreement = f"{row.agreement_mean:.4f} / {row.agreement_p5:.4f}"
        *seconds, peak = row.figures.values()
        cells = [agreement, f"{row.mib_on_disk:.0f}", *(f"{s:.3g}" for s in seconds), f"{peak:.0f}"]
        table.add_row(row.title, *cells)
    console = Console(width=150)
    console.print(table)
    for row in rows.values():
        if row.missed:
            console.print(f"{row.title}: not timed: {row.missed}", highlight=False)


def draw(model: str, rows: list[Row], path: Path) -> None:
    """Bars, one panel a question: how many times as long as the fastest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if not row.missed]
    names = list(timed[0].figures)
    figure, panels = pyplot.subplots(
        1,
        len(names),
        figsize=(2.1 * len(names) + 2, 0.9 + 0.38 * len(timed)),
        sharey=True,
        layout="constrained",
    )
    colours = ["#1f6f8b" if row.title.startswith("ours") else "#9aa5ab" for row in timed]
    for name, axes in zip(names, panels, strict=True):
        values = [row.figures[name] for row in timed]
        bars = axes.barh([row.title for row in timed], values, color=colours)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
        axes.set_title(name if name == "MiB" else f"{name}, s", fontsize=9)
        axes.margins(x=0.35)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_xticks([])
    panels[0].invert_yaxis()
    figure.suptitle(f"{model} on a CPU: less is better", fontsize=10)
    figure.savefig(path, dpi=150, metadata={})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run(main))
