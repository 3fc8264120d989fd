"""Figures printed in the DB-SAM paper, shown beside ours and never mixed with them.

Source: DB-SAM (MICCAI 2024, arXiv 2410.04172), its two result tables: 21 tasks in 3D, 9 in 2D. The
tasks stand in `export/evaluation/rows.toml`, with what is known of each; the averages of SAM,
MedSAM and DB-SAM stand here.

The paper's test images are not ours. A row is filled from our data only where its words are those
of the data, see `rows`; rows without data are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .metrics import LEVEL, bootstrap_mean
from .results import (
    CaseResult,
    EvaluationResult,
    Interval,
    IntervalUnit,
    ObjectResult,
    Score,
    mean_score,
)
from .rows import PublishedRow

SOURCE = "DB-SAM, MICCAI 2024, arXiv 2410.04172"


@dataclass(frozen=True)
class PaperAverage:
    """A model's average over one of the paper's tables, in per cent."""

    model: str
    dimensions: Literal["2D", "3D"]
    tasks: int
    dsc: float
    nsd: float


AVERAGES = (
    PaperAverage("DB-SAM", "3D", 21, 87.05, 85.31),
    PaperAverage("MedSAM", "3D", 21, 81.02, 76.54),
    PaperAverage("SAM", "3D", 21, 58.52, 37.49),
    PaperAverage("DB-SAM", "2D", 9, 82.00, 91.81),
    PaperAverage("MedSAM", "2D", 9, 77.22, 83.17),
    PaperAverage("SAM", "2D", 9, 59.62, 64.27),
)


@dataclass(frozen=True)
class Comparison:
    """A row of a published table with our figure beside it.

    Attributes:
        row: the paper's, or a user's.
        ours: our mean over the same structure.
        count: cases (objects, where a case is about several labels) in it.
        interval: of our Dice, by drawing those; None for fewer than two.
        task: our task folders.
    """

    row: PublishedRow
    ours: Score
    count: int
    interval: Interval | None
    task: str


def compare(result: EvaluationResult, rows: Sequence[PublishedRow]) -> tuple[Comparison, ...]:
    """The rows for which there is data, in their order."""
    kinds = {case.file: case.dimensions for case in result.cases}
    found: dict[str, list[ObjectResult | CaseResult]] = {}
    for item in _items(result):
        path, kind = _path(item), kinds.get(item.file, "")
        for row in rows:
            if row.answers(path, item.label_name, kind):
                found.setdefault(row.name, []).append(item)
    return tuple(_comparison(row, found[row.name], result) for row in rows if row.name in found)


def our_average(dimensions: str, comparisons: Sequence[Comparison]) -> float | None:
    """Our mean Dice over one of the paper's tables, only if there is data for every row of it."""
    own = [c.ours.dsc for c in comparisons if c.row.is_papers and c.row.dimensions == dimensions]
    tasks = next(average.tasks for average in AVERAGES if average.dimensions == dimensions)
    return sum(own) / tasks if len(own) == tasks else None


def _items(result: EvaluationResult) -> Iterable[ObjectResult | CaseResult]:
    """Cases where each is about one label, else objects."""
    return result.cases if result.settings["protocol"] == "medsam" else result.objects


def _path(item: ObjectResult | CaseResult) -> str:
    """Task and file; a file's name begins with its task's, unless the task is the data folder."""
    return item.file if item.file.startswith(f"{item.task}/") else f"{item.task}/{item.file}"


def _comparison(
    row: PublishedRow, items: list[ObjectResult | CaseResult], result: EvaluationResult
) -> Comparison:
    scores = [item.score for item in items]
    ends = bootstrap_mean([score.dsc for score in scores], result.settings["seed"])
    unit: IntervalUnit = "cases" if isinstance(items[0], CaseResult) else "objects"
    interval = None if ends is None else Interval(*ends, unit=unit, level=LEVEL)
    tasks = sorted({item.task for item in items})
    return Comparison(row, mean_score(scores), len(items), interval, ", ".join(tasks))
