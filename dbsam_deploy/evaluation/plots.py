"""Pictures of a result: SVG plots by task, and the worst cases as PNG overlays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.imaging import ByteArray
from ..files.pages import svg_of
from ..images.overlays import Panel, draw_overlay
from ..images.volumes import png_bytes
from .calibration import Calibration
from .metrics import load_library
from .results import EvaluationResult, Interval, Overlay, TaskResult

MISSED, AGREED, EXTRA = 1, 2, 3
_OURS, _BOX = "#0072b2", "#d55e00"  # told apart with any colour vision


def check_libraries() -> None:
    """Refuse before a long run what would fail after it.

    Raises:
        EngineError: Matplotlib or Jinja2 is not installed.
    """
    for name in ("matplotlib", "jinja2"):
        load_library(name)


def task_plot(result: EvaluationResult) -> str:
    """Dice and, if measured, NSD of each task with its interval, and the box's own, as SVG.

    Raises:
        EngineError: Matplotlib is not installed.
    """
    figure_type = load_library("matplotlib.figure").Figure
    with load_library("matplotlib").rc_context({"svg.hashsalt": "dbsam", "font.size": 9}):
        tasks = list(result.tasks)[::-1]  # the first on top
        names = ["dsc"] + ["nsd"] * all(task.mean.score.nsd is not None for task in tasks)
        size = (5.2 * len(names) + 1.5, 0.32 * len(tasks) + 1.3)
        figure = figure_type(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axis, name in zip(axes, names, strict=True):
            _draw_tasks(axis, tasks, name)
        axes[0].set_yticks(range(len(tasks)), [task.task for task in tasks])
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}
        axes[0].legend(frameon=False, **above)
        return svg_of(figure)


def _draw_tasks(axis: Any, tasks: Sequence[TaskResult], name: str) -> None:
    rows = np.arange(len(tasks))
    values = [float(getattr(task.mean.score, name)) for task in tasks]
    boxes = [float(getattr(task.mean.score, f"box_{name}")) for task in tasks]
    intervals: list[Interval | None] = [getattr(task.mean, f"{name}_interval") for task in tasks]
    for row, interval in zip(rows, intervals, strict=True):
        if interval is not None:
            axis.plot([interval.low, interval.high], [row, row], color=_OURS, linewidth=1.5)
    axis.plot(boxes, rows, "|", color=_BOX, markersize=11, markeredgewidth=2, label="box itself")
    axis.plot(values, rows, "o", color=_OURS, markersize=5, label="model, 95 % interval")
    axis.set_xlim(0, 1)
    axis.set_xlabel({"dsc": "Dice", "nsd": "NSD"}[name])
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def reliability_plot(calibration: Calibration) -> str:
    """Mean true IoU over mean predicted IoU of each bin, a dot as large as its objects, as SVG.

    Raises:
        EngineError: Matplotlib is not installed.
    """
    figure_type = load_library("matplotlib.figure").Figure
    with load_library("matplotlib").rc_context({"svg.hashsalt": "dbsam", "font.size": 9}):
        figure = figure_type(figsize=(3.6, 3.4), layout="constrained")
        axis = figure.subplots()
        predicted = [one.predicted for one in calibration.bins]
        true = [one.true for one in calibration.bins]
        sizes = [200 * one.count / calibration.count + 8 for one in calibration.bins]
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="as predicted")
        axis.plot(predicted, true, color=_OURS, linewidth=1)
        axis.scatter(predicted, true, s=sizes, color=_OURS, label="model, by tenths")
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted IoU", ylabel="true IoU", aspect=1)
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper left")
        return svg_of(figure)


def overlay_png(overlay: Overlay) -> bytes:
    """The image with its box beside the same with missed, agreed and surplus pixels, as PNG."""
    x0, y0, x1, y1 = overlay.box
    difference = np.zeros(overlay.truth.shape, np.uint8)
    difference[overlay.truth & ~overlay.prediction] = MISSED
    difference[overlay.truth & overlay.prediction] = AGREED
    difference[~overlay.truth & overlay.prediction] = EXTRA
    blank = np.zeros_like(difference)
    image: ByteArray = np.ascontiguousarray(overlay.image)
    picture = draw_overlay(
        [
            Panel(image, blank, [(EXTRA, (x0, y0, x1, y1))], caption="image and box"),
            Panel(image, difference, caption="truth and prediction"),
        ],
        [(MISSED, "missed"), (AGREED, "found"), (EXTRA, "surplus")],
    )
    return png_bytes(np.asarray(picture))
