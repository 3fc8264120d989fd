"""`predict` of objects that are carried through a volume: progress, files, going on later."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
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
from ..outputs.files import OVERLAY, mean_confidence, write
from ..outputs.segmentation import Segmentation
from ..prediction.segment import Progress
from ..volumes.study import check_study
from ..volumes.study_prompts import StudyPrompts
from .model import Model

RESUME_ENDING = "_unfinished.db"
"""Of the file in the output folder that keeps finished slices until the result is there."""


def check_replaceable(paths: Mapping[str, Path], *, may_replace: bool) -> None:
    """Refuse to replace a volume's results, which may be hours of work, without being told to.

    Raises:
        InputError: one of them is there.
    """
    there = [path for path in paths.values() if path.exists()]
    if there and not may_replace:
        raise InputError(
            f"{there[0]} is there already: --overwrite replaces it, --merge adds to it, or choose "
            "another --output folder"
        )


def predict_study(
    args: argparse.Namespace,
    volume: Volume,
    spec: StudyPrompts,
    paths: Mapping[str, Path],
    open_model: Callable[[], Model],
    introduce: Callable[[Model], None],
) -> int:
    """Segment a study and write it; what is finished is kept if the run ends before.

    Args:
        args: the options of the command.
        volume: what was read.
        spec: what is asked of it.
        paths: what is written, see `outputs.files.planned`.
        open_model: called once the prompts are known to fit.
        introduce: prints image and model.
    """
    check_study(spec, volume)
    unfinished = _unfinished(paths)
    if not args.resume:
        with suppress(FileNotFoundError):
            unfinished.unlink()
    console = table_console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    notes: list[str] = []
    with open_model() as model:
        introduce(model)
        if args.resume and not unfinished.exists():
            say(f"NOTE: nothing to resume in {unfinished}: begun anew")
        with _kept(unfinished), _progress(Console(stderr=True)) as progress:
            start = time.perf_counter()
            found = model.study(
                volume, spec, progress=progress, say=notes.append, checkpoint=unfinished
            )
            seconds = time.perf_counter() - start
            written = list(write(found, paths))
    unfinished.unlink(missing_ok=True)
    if OVERLAY in paths:
        written.append(write_file(paths[OVERLAY], png_bytes(np.asarray(picture(found)))))
    _report(console, found, seconds)
    for note in notes:
        say(f"NOTE: {note}")
    for path in written:
        say(f"wrote {path}")
    return 0


def _unfinished(paths: Mapping[str, Path]) -> Path:
    """Beside the results, and named as they are."""
    first = next(iter(paths.values()))
    return first.with_name(first.name.partition("_mask")[0] + RESUME_ENDING)


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
def _progress(console: Console) -> Iterator[Progress]:
    left = TimeRemainingColumn(elapsed_when_finished=True)
    with progress_bars(console, _Rate(), left, transient=True) as bar:
        task = bar.add_task("segmenting slices", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _report(console: Console, found: Segmentation, seconds: float) -> None:
    spacing = found.image.spacing_mm
    table = Table("label", "object", "slices", "voxels", *["ml"] * bool(spacing), "predicted IoU")
    confidence = mean_confidence(found)
    for row, one in enumerate(found.objects):
        inside = found.labels == one.label
        slices = np.flatnonzero(inside.any((1, 2)))
        voxels = int(np.count_nonzero(inside))
        extent = f"{slices[0]}–{slices[-1]}" if slices.size else "none"
        volume = [f"{voxels * np.prod(spacing) / 1000:.1f}"] if spacing else []
        name = escape(one.name)
        table.add_row(str(one.label), name, extent, str(voxels), *volume, f"{confidence[row]:.3f}")
    console.print(table)
    console.print(f"{seconds:.1f} s", highlight=False)


def picture(found: Segmentation) -> Any:
    """At most nine slices with what was found on them, and a legend."""
    inside = np.flatnonzero((found.labels > 0).any((1, 2))).tolist()
    panels = [
        Panel(found.image.slice_rgb(z), found.labels[z], caption=f"slice {z}")
        for z in evenly_spaced(inside or [len(found.labels) // 2])
    ]
    legend = [(one.label, f"{one.label}  {one.name}") for one in found.objects]
    return draw_overlay(panels, legend, found.note)
