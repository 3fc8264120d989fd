"""`python -m dbsam_deploy.prompts_check`: how an export's weights take points, measured."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .api.loading import open_model
from .artefact import MANIFEST_NAME, Artefact, find_export, read_artefact, write_artefact
from .cli import HelpFormatter, Parser, as_called, progress_bars, run, table_console
from .core.errors import InputError
from .core.points import POINTS, rules_of
from .datasets.finding import add_reading_options, find_cases, reading_of
from .evaluation.point_check import Answers, PointFigures, check_points
from .files.locks import one_writer
from .prediction.predictor import Predictor
from .serving.repository import REPOSITORY_NAME, repository_beside
from .sessions.backends import ModelOptions

DESCRIPTION = """\
Measure how an export's weights take prompts with points, and record it in the export.

Weights that were trained with boxes alone (MedSAM, LiteMedSAM, DB-SAM) answer a point with an empty
mask. For each kind of prompt the decoder's own answer is compared with the best of several boxes
that are tried in its place; where these are better by 0.02 of Dice, predict, the viewer server and
Triton try boxes from then on. An export sets a first value by the images of its gate.

examples:
  the newest export, on your own labelled images
    python -m dbsam_deploy.prompts_check --data DIR
  only look
    python -m dbsam_deploy.prompts_check build/fp16 --data DIR --dry-run
"""

_ROWS = {
    "first": "click, no box",
    "past_box": "click past a box",
    "in_box": "click outside, in a box",
}


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m dbsam_deploy.prompts_check",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "export", type=Path, nargs="?", metavar="EXPORT", help="by default the newest below build/"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="labelled images, as for evaluate"
    )
    add_reading_options(data)
    data.add_argument("--objects", type=int, default=24, metavar="N", help="to measure at most")
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    return parser


def _answers(answers: Answers) -> tuple[str, str]:
    return f"{answers.dice:.3f}", f"{answers.obeyed:.0%}"


def figures_table(figures: PointFigures, title: str) -> Table:
    """One row for each kind of prompt."""
    table = Table(title=title, caption=f"Dice of the objects' own boxes: {figures.tight:.3f}")
    table.add_column("prompt", no_wrap=True)
    for column in ("objects", "box alone", "decoder", "obeyed", "boxes tried", "obeyed"):
        table.add_column(column, justify="right")
    table.add_column("better")
    for kind, one in figures.kinds.items():
        better = "search" if one.needs_search else "native"
        table.add_row(
            _ROWS[kind],
            str(one.objects),
            "" if one.without is None else f"{one.without:.3f}",
            *_answers(one.native),
            *_answers(one.search),
            better if one.is_decided else f"{better}? too few",
        )
    return table


def record_points(artefact: Artefact, figures: PointFigures) -> Artefact:
    """Write what was measured into an export's manifest, whole or not at all.

    The export is not newer for it: commands that take the newest take the same one as before.

    Raises:
        InputError: too few images, or another export in its place.
    """
    folder = artefact.folder
    record = figures.record(rules_of(artefact.points))
    with one_writer(folder.parent):
        now = read_artefact(folder)
        if (now.key, now.graphs) != (artefact.key, artefact.graphs):
            raise InputError(f"{folder} was exported again meanwhile: measure it again")
        changed = replace(now, weights={**now.weights, POINTS: record})
        times = (folder / MANIFEST_NAME).stat()
        path = write_artefact(changed)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return changed


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's `--help`."""
    args = build_parser().parse_args(argv)
    if args.objects < 1:
        raise InputError(f"--objects {args.objects}: expected at least 1")
    folder = find_export(args.export)
    files = find_cases(args.data, reading=reading_of(args))
    artefact = read_artefact(folder)
    if not artefact.weights.get("trained"):
        raise InputError(f"{folder}: its weights are not trained, so there is nothing to measure")
    console = table_console()
    with open_model(ModelOptions(artefact=folder)) as model:
        if not isinstance(model.predictor, Predictor):
            raise InputError(f"{folder} runs elsewhere")
        with progress_bars(Console(stderr=True), transient=True) as bar:
            task = bar.add_task("measuring", total=min(len(files), args.objects))
            figures = check_points(
                model.predictor,
                files,
                most_objects=args.objects,
                progress=lambda done, name: bar.update(task, completed=done, description=name),
            )
    console.print(figures_table(figures, f"{folder}: {figures.images} images"))
    if args.dry_run:
        figures.record(rules_of(artefact.points))
        return 0
    changed = record_points(artefact, figures)
    lines = [f"recorded in {folder / MANIFEST_NAME}: {rules_of(changed.points)}"]
    repository = repository_beside(folder)
    if changed.weights != artefact.weights and (repository / REPOSITORY_NAME).is_file():
        fill = f"python -m dbsam_deploy.serving.repository --artefact {shlex.quote(str(folder))}"
        lines.append(f"fill its repository again: {fill}")
    for line in lines:
        console.print(as_called(line), markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
