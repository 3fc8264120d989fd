"""Plots of a load test as SVG: latency and throughput by load, and the tail of each curve."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np

from ..extras import require
from .run import LoadPoint

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart with any colour vision
_PERCENTILES = (50, 95, 99)
_TAIL = (0, 50, 75, 90, 95, 99, 99.5, 99.9)


def require_libraries() -> None:
    """Refuse before a long run what would fail after it.

    Raises:
        MissingError: Matplotlib or Jinja2 is not installed.
    """
    for name in ("matplotlib.figure", "jinja2"):
        require(name, extra="loadtest", what_for="the page of a load test")


def load_plot(points: Sequence[LoadPoint]) -> str:
    """Latency percentiles above throughput, a column for each kind of work, as SVG."""
    works = list(dict.fromkeys(point.work for point in points))
    with _figure((5.4 * len(works), 6.4)) as (figure, svg):
        axes = figure.subplots(2, len(works), squeeze=False, sharex="col")
        for column, work in enumerate(works):
            chosen = [point for point in points if point.work == work]
            _draw_latency(axes[0][column], chosen)
            _draw_throughput(axes[1][column], chosen)
            axes[0][column].set_title(work, fontweight="bold")
    return svg()


def tail_plot(points: Sequence[LoadPoint]) -> str:
    """Latency by percentile under the highest load, on the scale of the tail, as SVG."""
    works = list(dict.fromkeys(point.work for point in points))
    with _figure((5.4 * len(works), 3.4)) as (figure, svg):
        axes = figure.subplots(1, len(works), squeeze=False)[0]
        for axis, work in zip(axes, works, strict=True):
            chosen = [point for point in points if point.work == work]
            most = max(point.load.amount for point in chosen)
            highest = [point for point in chosen if point.load.amount == most]
            for colour, point in zip(_COLOURS, highest, strict=False):
                if point.tally.right:
                    shares = [1 / (1 - percentile / 100) for percentile in _TAIL]
                    values = [point.tally.latency_ms(percentile) for percentile in _TAIL]
                    axis.plot(shares, values, "o-", color=colour, ms=3, label=point.way)
            axis.set_xscale("log")
            axis.set_xticks([1 / (1 - p / 100) for p in (0, 50, 90, 99, 99.9)])
            axis.set_xticklabels(["0", "50", "90", "99", "99.9"])
            axis.minorticks_off()
            axis.set_xlabel("percentile")
            axis.set_title(f"{work}, {highest[0].load}", fontweight="bold")
            _finish(axis, "latency, ms")
    return svg()


def _by_way(points: Sequence[LoadPoint]) -> Iterator[tuple[str, str, list[LoadPoint]]]:
    """Colour, way and its points by load."""
    ways = list(dict.fromkeys(point.way for point in points))
    ordered = sorted(points, key=lambda point: (ways.index(point.way), point.load.amount))
    for way, found in groupby(ordered, key=lambda point: point.way):
        yield _COLOURS[ways.index(way) % len(_COLOURS)], way, list(found)


def _draw_latency(axis: Any, points: Sequence[LoadPoint]) -> None:
    styles = dict(zip(_PERCENTILES, ("o-", "o--", "o:"), strict=True))
    for colour, _, found in _by_way(points):
        for percentile, style in styles.items():
            latencies = [point.tally.latency_ms(percentile) for point in found]
            _line(axis, found, latencies, style, color=colour)
    for percentile, style in styles.items():  # colours are named in the plot below
        axis.plot([], [], style, color="0.3", markersize=3, label=f"p{percentile}")
    if any(point.tally.right for point in points):  # nothing has no place on a log scale
        axis.set_yscale("log")
        ticker = require("matplotlib.ticker", extra="loadtest", what_for="a plot")
        axis.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter("{x:g}")
    _finish(axis, "latency, ms")


def _draw_throughput(axis: Any, points: Sequence[LoadPoint]) -> None:
    for colour, way, found in _by_way(points):
        answers = [point.tally.throughput for point in found]
        _line(axis, found, answers, "o-", color=colour, label=f"{way}, right answers")
        if any(point.tally.shed for point in found):
            shed = [point.tally.shed / point.tally.seconds for point in found]
            _line(axis, found, shed, "x:", color=colour, label=f"{way}, shed")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("requests at a time" if points[0].load.concurrency else "requests a second")
    _finish(axis, "a second")


def _line(
    axis: Any, points: Sequence[LoadPoint], values: Sequence[float | None], style: str, **more: str
) -> None:
    heights = [np.nan if value is None else value for value in values]
    loads = [point.load.amount for point in points]
    axis.plot(loads, heights, style, markersize=3, **more)
    axis.set_xscale("log", base=2)
    axis.set_xticks(loads)
    axis.set_xticks([], minor=True)
    axis.xaxis.set_major_formatter("{x:g}")


def _finish(axis: Any, label: str) -> None:
    axis.set_ylabel(label)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[tuple[Any, Callable[[], str]]]:
    require_libraries()
    figure_type = require("matplotlib.figure", extra="loadtest", what_for="a plot").Figure
    library = require("matplotlib", extra="loadtest", what_for="a plot")
    stream = io.StringIO()

    def svg() -> str:
        text = stream.getvalue()
        return text[text.index("<svg") :]

    with library.rc_context({"svg.hashsalt": "dbsam", "font.size": 9}):
        figure = figure_type(figsize=size, layout="constrained")
        yield figure, svg
        figure.savefig(stream, format="svg", metadata={"Date": None})
