"""`predict` of objects that are carried through a volume: progress, files, going on later."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import ProgressColumn, Task, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..cli import progress_bars, table_console
from ..core.errors import InputError
from ..files.atomic import write_file
from ..images.overlays import Panel, draw_overlay, evenly_spaced
from ..images.volumes import Volume, png_bytes
from ..outputs.files import ENDINGS, FRACTIONS, OVERLAY, write
from ..outputs.merging import Earlier, merged, read_earlier
from ..outputs.object_statistics import mean_confidence, voxel_counts, voxel_ml
from ..outputs.review import review_line
from ..outputs.segmentation import Segmentation
from ..prediction.segment import Progress
from ..volumes.kept_answers import remove_answers
from ..volumes.study import check_study
from ..volumes.study_prompts import StudyPrompts
from .model import Model

UNFINISHED = "_unfinished.db"
"""Of the file in the output folder that keeps finished slices until the result is there."""


def earlier_result(
    args: argparse.Namespace, volume: Volume, paths: Mapping[str, Path], names: Iterable[str]
) -> Earlier | None:
    """What new objects are added to, with `--merge`; a volume's results may be hours of work.

    Args:
        args: the options of the command.
        volume: what is segmented.
        paths: what is written.
        names: of the new objects.

    Raises:
        InputError: a result is there and may not be replaced, or cannot be added to.
    """
    there = [path for path in paths.values() if path.exists()]
    if args.merge and FRACTIONS in paths:
        raise InputError(f"--merge: probabilities cannot be added to, drop {FRACTIONS}")
    if there and not (args.overwrite or args.merge):
        raise InputError(
            f"{there[0]} is there already: --overwrite replaces it, --merge adds to it, or choose "
            "another --output folder"
        )
    if not there or not args.merge:
        return None
    found = read_earlier(volume, paths)
    found.check(names, overwrite=args.overwrite)
    return found


def predict_study(
    args: argparse.Namespace,
    volume: Volume,
    spec: StudyPrompts,
    paths: Mapping[str, Path],
    open_model: Callable[[], Model],
    introduce: Callable[[Model], None],
) -> Sequence[Path]:
    """Segment a study and write it; what is finished is kept if the run ends before.

    Args:
        args: the options of the command.
        volume: what was read.
        spec: what is asked of it.
        paths: what is written, see `outputs.files.planned`.
        open_model: called once the prompts are known to fit.
        introduce: prints image and model.

    Returns:
        The files, and the folder of a volume's PNG files.
    """
    check_study(spec, volume)
    old = earlier_result(args, volume, paths, [one.name for one in spec.objects])
    unfinished = _unfinished(paths)
    if not args.resume:
        remove_answers(unfinished)
    notes: list[str] = []
    with open_model() as model:
        introduce(model)
        if args.resume and not unfinished.exists():
            notes.append(f"nothing to resume in {unfinished}: begun anew")
        with _kept(unfinished), slice_progress() as progress:
            start = time.perf_counter()
            found = model.study(
                volume,
                spec,
                fractions=FRACTIONS in paths,
                progress=progress,
                say=notes.append,
                checkpoint=unfinished,
            )
            review = review_line(found, args.min_confidence)
            notes.insert(0, f"{time.perf_counter() - start:.1f} s")
            found = found if old is None else merged(old, found, overwrite=args.overwrite)
            written = list(write(replace(found, min_confidence=args.min_confidence), paths))
    remove_answers(unfinished)
    if OVERLAY in paths:
        written.append(write_file(paths[OVERLAY], png_bytes(np.asarray(picture(found)))))
    _report(found, notes, written, review)
    return written


def _report(
    found: Segmentation, notes: Sequence[str], written: Sequence[Path], review: str
) -> None:
    console = table_console()
    console.print(_table(found))
    seconds, *lines = notes
    wrote = (f"wrote {path}" for path in written)
    for line in (seconds, *(f"NOTE: {n}" for n in lines), *filter(None, [review]), *wrote):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _unfinished(paths: Mapping[str, Path]) -> Path:
    """Beside the results, and named as they are."""
    name, path = next(iter(paths.items()))
    return path.with_name(path.name.removesuffix(ENDINGS[name].removesuffix(".png")) + UNFINISHED)


@contextmanager
def _kept(unfinished: Path) -> Iterator[None]:
    """Say after an interruption how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if unfinished.exists():
            raise KeyboardInterrupt(
                "finished slices are kept: the same command with --resume goes on from them"
            ) from interrupt
        raise


class _Rate(ProgressColumn):
    """Slices in a second, or seconds for a slice, whichever is more than 1."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f} slices/s" if speed >= 1 else f"{1 / speed:.1f} s/slice")


@contextmanager
def slice_progress() -> Iterator[Progress]:
    """A bar with the slices, their rate and the time left."""
    left = TimeRemainingColumn(elapsed_when_finished=True)
    with progress_bars(Console(stderr=True), _Rate(), left, transient=True) as bar:
        task = bar.add_task("segmenting slices", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _table(found: Segmentation) -> Table:
    each_ml = voxel_ml(found.image)
    table = Table("label", "object", "slices", "voxels", *["ml"] * bool(each_ml), "predicted IoU")
    counts, confidence = voxel_counts(found).tolist(), mean_confidence(found)
    for row, one in enumerate(found.objects):
        slices = np.flatnonzero((found.labels == one.label).any((1, 2)))
        voxels = counts[row]
        extent = f"{slices[0]}–{slices[-1]}" if slices.size else "none"
        volume = [f"{voxels * each_ml:.1f}"] if each_ml else []
        name = escape(one.name)
        table.add_row(str(one.label), name, extent, str(voxels), *volume, f"{confidence[row]:.3f}")
    return table


def picture(found: Segmentation) -> Any:
    """At most nine slices with what was found on them, and a legend."""
    inside = np.flatnonzero((found.labels > 0).any((1, 2))).tolist()
    panels = [
        Panel(found.image.slice_rgb(z), found.labels[z], caption=f"slice {z}")
        for z in evenly_spaced(inside or [len(found.labels) // 2])
    ]
    legend = [(one.label, f"{one.label}  {one.name}") for one in found.objects]
    return draw_overlay(panels, legend, found.note)
