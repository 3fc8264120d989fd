"""A result as CSV tables and one JSON file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import atomic
from .calibration import calibrate
from .published import AVERAGES, SOURCE, Comparison
from .results import CaseResult, EvaluationResult, Mean, ObjectResult, Score, TaskResult

FORMAT = 1
_SCORE = (
    *("dsc", "nsd", "box_dsc", "box_nsd", "oracle_dsc", "cvpr24_dsc"),
    *("hd95", "volume_error"),
)
_ENDS = ("dsc_low", "dsc_high", "nsd_low", "nsd_high", "interval_of")

_CONFIDENCE = ("predicted_iou", "true_iou")

OBJECT_COLUMNS = (
    *("task", "file", "slice", "label", "label_name", "pixels", "box"),
    *_SCORE,
    *_CONFIDENCE,
)
CASE_COLUMNS = (
    "task",
    "case",
    "file",
    "label_name",
    "dimensions",
    "slices",
    "objects",
    "nsd_tolerance",
    *_SCORE,
)
TASK_COLUMNS = ("task", "dimensions", "cases", "objects", *_SCORE, *_ENDS, "below_box")


def write_files(
    folder: Path,
    result: EvaluationResult,
    comparisons: Sequence[Comparison],
    model: dict[str, Any],
) -> list[Path]:
    """Write `objects.csv`, `cases.csv`, `tasks.csv` and `evaluation.json`.

    Args:
        folder: made if missing.
        result: from `evaluate`.
        comparisons: from `published.compare`.
        model: what is known about the model, for the JSON file.

    Returns:
        The files' paths.

    Raises:
        InputError: the folder cannot be written.
    """
    tables = {
        "objects.csv": csv_text(OBJECT_COLUMNS, map(_object_row, result.objects)),
        "cases.csv": csv_text(CASE_COLUMNS, map(_case_row, result.cases)),
        "tasks.csv": csv_text(TASK_COLUMNS, map(_task_row, result.tasks)),
        "evaluation.json": json_text(result, comparisons, model),
    }
    return atomic.write_files({folder / name: text.encode() for name, text in tables.items()})


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A header and rows; None becomes an empty cell."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return stream.getvalue()


def json_text(
    result: EvaluationResult, comparisons: Sequence[Comparison], model: dict[str, Any]
) -> str:
    """Settings, model, every score, and the published figures apart from ours."""
    calibration = calibrate(result.objects)
    body = {
        "format": FORMAT,
        "model": model,
        **result.as_dict(),
        "calibration": None if calibration is None else asdict(calibration),
        "published": {
            "source": SOURCE,
            "averages_percent": [asdict(average) for average in AVERAGES],
            "tasks": [asdict(item) for item in comparisons],
        },
    }
    return json.dumps(body, indent=2, allow_nan=False) + "\n"


def _scores(score: Score) -> tuple[str, ...]:
    values = [getattr(score, name) for name in _SCORE]
    return tuple("" if value is None else f"{value:.6f}" for value in values)


def _object_row(item: ObjectResult) -> tuple[Any, ...]:
    box = " ".join(f"{value:g}" for value in item.box)
    where = (item.slice_index, item.label, item.label_name, item.pixels, box)
    ious = (item.predicted_iou, item.true_iou)
    confidence = ("" if value is None else f"{value:.6f}" for value in ious)
    return (item.task, item.file, *where, *_scores(item.score), *confidence)


def _case_row(case: CaseResult) -> tuple[Any, ...]:
    about = (case.dimensions, case.slices, case.objects, case.tolerance)
    return (case.task, case.name, case.file, case.label_name, *about, *_scores(case.score))


def _task_row(task: TaskResult) -> tuple[Any, ...]:
    counts = (task.task, task.dimensions, task.cases, task.objects)
    return (*counts, *_scores(task.mean.score), *_ends(task.mean), task.below_box)


def _ends(mean: Mean) -> tuple[str, ...]:
    cells: list[str] = []
    for interval in (mean.dsc_interval, mean.nsd_interval):
        cells += ["", ""] if interval is None else [f"{interval.low:.6f}", f"{interval.high:.6f}"]
    return (*cells, "" if mean.dsc_interval is None else mean.dsc_interval.unit)
