"""`python -m dbsam_deploy.sensitivity`: what each block of an encoder loses by quantisation.

A second composition root beside `dbsam_deploy.export`, which runs the same sweep for `--budget`.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .cli import as_called, check_before, progress_bars, run, table_console
from .options.sensitivity_options import SensitivityOptions, export_command, parse_words

if __name__ == "__main__":  # --help and a mistyped option need no PyTorch
    check_before(parse_words, "sensitivity", extra="export")

from .core.errors import InputError
from .evaluation.metrics import load_library
from .files.atomic import write_atomically, write_files, writing_to
from .files.locks import one_writer
from .files.pages import svg_of
from .graphs.onnx_export import export_graph
from .model import DbSam
from .model.weights import load_model
from .quantization.calibration_images import CalibrationSet, choose_images
from .quantization.quantizer import Quantizer, check_quantisable
from .quantization.sweep import Sweep
from .recipe import Recipe, calibration_plan, load_recipe
from .sessions.weights_choice import ModelChoice

_COLUMNS = (
    *("group", "layers", "macs"),
    *("error_alone", "agreement_alone", "agreement_p5_alone", "dice_drop_alone"),
    *("error_without", "agreement_without", "agreement_p5_without", "dice_drop_without"),
    "excluded",
)


@dataclass(frozen=True)
class SweepStages:
    """The functions that a sweep calls in turn; a test gives its own for what it is not about."""

    load_recipe: Callable[[str], Recipe] = load_recipe
    export_graph: Callable[[DbSam, str, Recipe, Path], object] = export_graph


def find_exclusions(
    options: SensitivityOptions, console: Console, *, stages: SweepStages | None = None
) -> tuple[Sweep, CalibrationSet]:
    """Export the float encoder, sweep, and write the results.

    Args:
        options: what to sweep.
        console: where progress goes.
        stages: the steps, by default the real ones.

    Returns:
        The result and the images it was found on.

    Raises:
        InputError, CheckpointError: a user's mistake.
        ExportError: the encoder cannot be exported or quantised.
        AccuracyError: no choice keeps to the budget.
    """
    stages = stages or SweepStages()
    recipe = stages.load_recipe(options.precision)
    plan = calibration_plan(recipe, options.calibration, options.budget)
    if plan is None or recipe.quantization is None or options.calibration is None:
        raise InputError(
            f"{options.precision} quantises no activations, so there is nothing to choose; use "
            "--precision int8 or fp8"
        )
    loaded = load_model(**vars(ModelChoice.of(options)))
    check_quantisable(loaded, recipe)  # before anybody is asked for more images
    images = choose_images(options.calibration, plan)
    bars = progress_bars(console)
    quantizer = Quantizer.of(loaded, recipe, images, options.budget, bars)
    place, scratch = options.output, options.output / Quantizer.SCRATCH
    with one_writer(place, wait=options.wait, say=console.print), writing_to(place):
        scratch.mkdir(exist_ok=True)
        key_file, path = scratch / "encoder.key", scratch / "encoder.onnx"
        key = f"{loaded.weights['sha256']} {loaded.model.config} {recipe}"
        if not (path.is_file() and key_file.is_file() and key_file.read_bytes() == key.encode()):
            console.print("exporting the float encoder", highlight=False)
            key_file.unlink(missing_ok=True)  # it is no longer about the file beside it
            floats = replace(recipe, quantization=None)
            stages.export_graph(loaded.model, "encoder", floats, scratch)
            with write_atomically(key_file) as stream:
                stream.write(key.encode())
        with bars:
            found = quantizer.sweep(path, scratch)
        write_results(found, place)
    return found, images


def write_results(found: Sweep, folder: Path) -> None:
    """Write `sensitivity.json`, `.csv` and `.svg`.

    Raises:
        EngineError: Matplotlib is not installed.
    """
    contents = {
        "json": json.dumps(asdict(found), indent=2) + "\n",
        "csv": _csv(found),
        "svg": plot(found),
    }
    write_files({folder / f"sensitivity.{end}": text.encode() for end, text in contents.items()})


def _csv(found: Sweep) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in found.ranked:
        numbers = [
            f"{getattr(part, name):.6f}"
            for part in (row.alone, row.left_out)
            for name in ("error", "agreement", "agreement_p5", "dice_drop")
        ]
        group = row.group
        writer.writerow(
            [group.name, group.layers, group.macs, *numbers, group.name in found.exclude]
        )
    return stream.getvalue()


def plot(found: Sweep) -> str:
    """Embedding error of each group alone, and what leaving it out saves, as SVG.

    Raises:
        EngineError: Matplotlib is not installed.
    """
    figure_type = load_library("matplotlib.figure").Figure
    with load_library("matplotlib").rc_context({"svg.hashsalt": "dbsam", "font.size": 9}):
        rows = list(found.ranked)[::-1]
        figure = figure_type(figsize=(9, 0.26 * len(rows) + 1.2), layout="constrained")
        axis = figure.subplots()
        places = range(len(rows))
        kept = ["#d55e00" if row.group.name in found.exclude else "#0072b2" for row in rows]
        axis.barh(places, [100 * row.alone.error for row in rows], color=kept, height=0.6)
        saved = [100 * (found.everything.error - row.left_out.error) for row in rows]
        axis.plot(saved, places, "k|", markersize=9, markeredgewidth=2, label="saved if left out")
        axis.set_yticks(places, [row.group.name for row in rows])
        axis.set_xlabel("embedding error, % (bar: quantised alone; orange: left out by the choice)")
        axis.legend(frameon=False, loc="lower right")
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        return svg_of(figure)


def ranked_table(found: Sweep) -> Table:
    """Groups, the costliest first, and what was chosen."""
    table = Table(
        title="quantised alone, and everything but it",
        caption=f"chosen: {len(found.exclude)} groups left out, "
        f"{100 * found.chosen.mac_share:.1f} % of the work quantised, cosine "
        f"{found.chosen.cosine:.4f}, agreement {found.chosen.agreement:.4f} / "
        f"{found.chosen.agreement_p5:.4f}, "
        f"Dice drop {found.chosen.dice_drop:.4f} (budget {found.budget:g})",
    )
    table.add_column("group", no_wrap=True)
    for column in ("layers", "GMAC", "error alone", "agreement", "error without", "agreement", ""):
        table.add_column(column, justify="right")
    for row in found.ranked:
        table.add_row(
            row.group.name,
            str(row.group.layers),
            f"{row.group.macs / 1e9:.2f}",
            f"{100 * row.alone.error:.2f} %",
            f"{row.alone.agreement:.4f}",
            f"{100 * row.left_out.error:.2f} %",
            f"{row.left_out.agreement:.4f}",
            "left out" if row.group.name in found.exclude else "",
        )
    everything = found.everything
    table.add_section()
    total = (f"{100 * everything.error:.2f} %", f"{everything.agreement:.4f}")
    table.add_row("everything", "", "", *total, "", "", "")
    return table


def main(argv: list[str] | None = None, *, stages: SweepStages | None = None) -> int:
    """Command line entry point; returns the exit status."""
    options = SensitivityOptions(**vars(parse_words(argv)))
    load_library("matplotlib")  # before hours of work
    found, _ = find_exclusions(options, Console(stderr=True), stages=stages)
    console = table_console()
    console.print(ranked_table(found))
    for pattern in found.exclude:
        console.print(f'  "{pattern}",', highlight=False, markup=False)
    console.print(
        f"wrote {options.output}/sensitivity.json, .csv and .svg; to use the choice, put the lines "
        f"above into the recipe's exclude, or run\n{as_called(export_command(options))}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
