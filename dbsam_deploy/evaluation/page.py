"""One self-contained HTML page of a result: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.atomic import write_file
from ..files.pages import render
from .calibration import POOR_DSC, calibrate, first_to_look_at
from .metrics import load_library
from .plots import overlay_png, reliability_plot, task_plot
from .published import Comparison
from .results import EvaluationResult, Mean, ObjectResult, Overlay
from .tables import (
    BELOW,
    LEGEND,
    average_rows,
    beside_cells,
    calibration_line,
    flagging_rows,
    interval_text,
    percent,
    published_cells,
    published_notes,
    row_name,
    skipped_lines,
    summary_rows,
    tolerance_text,
)

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_page(
    path: Path,
    result: EvaluationResult,
    comparisons: tuple[Comparison, ...],
    model: dict[str, Any],
) -> Path:
    """Write the page.

    Args:
        path: file to write.
        result: from `evaluate`, with `worst` pictures if they are wanted.
        comparisons: from `published.compare`.
        model: name → value, shown as given.

    Raises:
        EngineError: Matplotlib or Jinja2 is not installed.
        InputError: the file cannot be written.
    """
    jinja2 = load_library("jinja2")
    calibration = calibrate(result.objects)
    page = render(
        jinja2,
        TEMPLATE,
        model=model,
        settings=result.settings,
        plot=task_plot(result),
        beside=beside_cells(result, None),
        tasks=[_task_cells(result, index) for index in range(len(result.tasks))],
        below=BELOW,
        legend=f"{LEGEND}; {tolerance_text(result)}",
        summary=[
            (name, *_mean_cells(mean), *beside_cells(result, mean.score))
            for name, mean in summary_rows(result)
        ],
        above=(result.summary.tasks_above_box, len(result.tasks)),
        skipped=skipped_lines(result),
        published=[_published(item) for item in comparisons],
        averages=average_rows(comparisons),
        notes=published_notes(result),
        calibration=calibration_line(calibration),
        reliability="" if calibration is None else reliability_plot(calibration),
        flaggings=[] if calibration is None else flagging_rows(calibration),
        poor=percent(POOR_DSC),
        first=[_doubtful(item) for item in first_to_look_at(result)],
        worst=[_worst(overlay) for overlay in result.worst],
    )
    return write_file(path, page.encode())


def _mean_cells(mean: Mean) -> tuple[str, ...]:
    score = mean.score
    return (
        str(mean.count),
        percent(score.dsc),
        interval_text(mean.dsc_interval),
        percent(score.nsd),
        interval_text(mean.nsd_interval),
        percent(score.box_dsc),
        percent(score.box_nsd),
    )


def _task_cells(result: EvaluationResult, index: int) -> dict[str, Any]:
    task = result.tasks[index]
    counts = (task.dimensions, str(task.cases), str(task.objects))
    cells = (*counts, *_mean_cells(task.mean)[1:], *beside_cells(result, task.mean.score))
    return {"name": task.task, "cells": cells, "below": task.below_box}


def _published(item: Comparison) -> tuple[str, ...]:
    *figures, count = published_cells(item)
    return (item.row.dimensions, row_name(item), *figures, f"{count} in {item.task}")


def _doubtful(item: ObjectResult) -> tuple[str, ...]:
    name = item.label_name or f"label {item.label}"
    place = "" if item.slice_index is None else str(item.slice_index)
    ious = (percent(item.predicted_iou), percent(item.true_iou), percent(item.score.dsc))
    return (item.file, name, place, *ious)


def _worst(overlay: Overlay) -> dict[str, str]:
    result = overlay.result
    name = result.label_name or f"label {result.label}"
    figures: Sequence[str] = (
        f"Dice {percent(result.score.dsc)} %",
        f"box {percent(result.score.box_dsc)} %",
    )
    return {
        "png": base64.b64encode(overlay_png(overlay)).decode(),
        "text": f"{result.file}, {name}, slice {overlay.slice_index}: {', '.join(figures)}",
    }
