"""What a training tells: progress bars, `losses.csv` and TensorBoard logs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import TextColumn, TimeRemainingColumn

from ..cli import progress_bars
from ..extras import require
from ..files.atomic import write_atomically
from .recipe import TrainingRecipe
from .state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

LOSSES_NAME, TENSORBOARD_NAME = "losses.csv", "tensorboard"
_COLUMNS = ("phase", "step", "loss", "cosine", "dice", "mask_loss", "iou_loss", "learning_rate")
_LINES = 20
"""A line of text every so many steps where there is no terminal for a bar."""


class Journal:
    """Reports of one training, on the main process only.

    Args:
        output: folder of the training.
        recipe: for the totals.
        resumed: the resume point; later lines of an earlier, longer log are dropped.
        console: where bars and notes go.
        accelerator: says which process this is.

    Raises:
        EngineError: TensorBoard is not installed.
    """

    def __init__(
        self,
        output: Path,
        recipe: TrainingRecipe,
        resumed: TrainingState | None,
        console: Console,
        accelerator: Accelerator,
    ) -> None:
        self._active = accelerator.is_main_process
        self._console = console
        self._totals = {name: phase.steps for name, phase in recipe.phases()}
        self._tasks: dict[str, Any] = {}
        self._path = output / LOSSES_NAME
        self._offsets = _offsets(recipe)
        self._resumed = resumed
        self._log_folder = output / TENSORBOARD_NAME
        self._progress = progress_bars(
            console,
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            shown=self._active,
        )

    def __enter__(self) -> Journal:
        if self._active:
            self._open()
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._active:
            self._progress.stop()
            self._file.close()
            self._board.close()

    def _open(self) -> None:
        require("tensorboard", extra="train", what_for="the training log")
        from torch.utils.tensorboard import SummaryWriter

        kept = _kept_rows(self._path, self._resumed)
        with write_atomically(self._path) as stream, io.StringIO(newline="") as text:
            rows = csv.DictWriter(text, _COLUMNS)
            rows.writeheader()
            rows.writerows(kept)
            stream.write(text.getvalue().encode())
        self._file = self._path.open("a", newline="")
        self._rows = csv.DictWriter(self._file, _COLUMNS, extrasaction="ignore")
        purge = (
            self._offsets[self._resumed.position.phase] + self._resumed.position.step
            if (self._resumed)
            else None
        )
        self._board = SummaryWriter(str(self._log_folder), purge_step=purge)

    def note(self, text: str) -> None:
        """One line of text."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def step(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """Record one optimiser step."""
        self._rows.writerow({"phase": phase, "step": step, **metrics})
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(f"{phase}/{name}", value, self._offsets[phase] + step)
        shown = [f"{k} {metrics[k]:.4f}" for k in ("loss", "cosine", "dice") if k in metrics]
        note = "  ".join(shown)
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(
                phase, total=self._totals[phase], note=note
            )
        self._progress.update(self._tasks[phase], completed=step, note=note)
        if not self._console.is_terminal and (step % _LINES == 0 or step == self._totals[phase]):
            seconds = metrics.get("seconds", 0)
            self.note(f"{phase} {step}/{self._totals[phase]}  {note}  {seconds:.2f} s")

    def validation(self, phase: str, step: int, dice: float) -> None:
        """Record a validation."""
        self._board.add_scalar(f"{phase}/validation_dice", dice, self._offsets[phase] + step)
        self.note(f"{phase} {step}: validation Dice {dice:.4f}")

    @contextmanager
    def counter(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar for `total` things of another kind; yields what advances it."""
        task = self._progress.add_task(text, total=total, note="")
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self._progress.advance(task)
            quiet = self._console.is_terminal or not self._active
            if not quiet and (done % (5 * _LINES) == 0 or done == total):
                self.note(f"{text} {done}/{total}")

        yield advance
        self._progress.remove_task(task)


def _offsets(recipe: TrainingRecipe) -> dict[str, int]:
    """Steps before each phase, so that logs of all phases share one axis."""
    offsets, total = {}, 0
    for name, phase in recipe.phases():
        offsets[name] = total
        total += phase.steps
    return offsets


def _kept_rows(path: Path, resumed: TrainingState | None) -> list[dict[str, str]]:
    """Rows of an earlier log up to the resume point."""
    if resumed is None or not path.is_file():
        return []
    with path.open(newline="") as stream:
        rows = [{k: row.get(k) or "" for k in _COLUMNS} for row in csv.DictReader(stream)]
    return rows[: len(resumed.position.losses)]
