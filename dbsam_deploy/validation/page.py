"""One self-contained HTML page of a validation: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from ..extras import require
from ..files.atomic import write_file
from ..files.pages import render, svg_of
from .record import PAGE_NAME, Findings
from .verdicts import Judgement, Verdict

TEMPLATE = Path(__file__).with_name("report.html.jinja")
COLOURS = {
    Verdict.PASS: "#0072b2",
    Verdict.FAIL: "#d55e00",
    Verdict.NOT_RUN: "#999999",
    Verdict.OUT_OF_TIME: "#cc79a7",
}
"""Told apart with any colour vision."""
SHOWN_S = 0.5
_FOR = "the page of a validation"


def check_libraries() -> None:
    """Refuse before a long run what would fail in it.

    Raises:
        MissingError: Matplotlib or Jinja2 is not installed.
    """
    require("matplotlib", extra="validate", what_for=_FOR)
    require("jinja2", extra="validate", what_for=_FOR)


def write_page(folder: Path, record: Findings) -> Path:
    """Write `report.html`, whole, and return its path.

    Args:
        folder: of the report.
        record: what to show.

    Raises:
        MissingError: Matplotlib or Jinja2 is not installed.
        InputError: it cannot be written.
    """
    jinja2 = require("jinja2", extra="validate", what_for=_FOR)
    page = render(
        jinja2,
        TEMPLATE,
        record=record,
        counts=record.counts(),
        inputs=record.inputs,
        outcomes=record.outcomes,
        plots=_plots(record.outcomes),
        rows=_timing_rows(record.outcomes),
    )
    return write_file(folder / PAGE_NAME, page.encode())


def _plots(outcomes: Sequence[Judgement]) -> list[tuple[str, str]]:
    """Title and SVG of each plot for which there are figures."""
    errors = {
        f"{one.check}: {name}": float(share)
        for one in outcomes
        if one.step in ("operators", "replay")
        for name, share in one.figures.get("share_of_bound", {}).items()
    }
    speeds = {
        f"{one.check}: {name}": float(share)
        for one in outcomes
        for name, share in one.figures.get("share_of_ceiling", {}).items()
    }
    slow = [one for one in outcomes if one.seconds >= SHOWN_S]
    seconds = {f"{one.step}: {one.check}": one.seconds for one in slow}
    colours = tuple(COLOURS[one.verdict] for one in slow)
    ours = (COLOURS[Verdict.PASS],)
    plots = (
        ("Error of the kernels, as a share of what is allowed", errors, 1.0, ours),
        ("Share of the nearer ceiling: memory, or GEMM", speeds, 1.0, ours),
        (f"Seconds of the checks that took {SHOWN_S} s or more", seconds, None, colours),
    )
    return [
        (title, _bars(tuple(values.items()), limit, tints))
        for title, values, limit, tints in plots
        if values
    ]


@functools.lru_cache(maxsize=8)  # most are the same after the next step
def _bars(
    values: tuple[tuple[str, float], ...], limit: float | None, colours: tuple[str, ...]
) -> str:
    """Horizontal bars as SVG, the first on top; a line at `limit`."""
    figure_type = require("matplotlib.figure", extra="validate", what_for=_FOR).Figure
    matplotlib = require("matplotlib", extra="validate", what_for=_FOR)
    names, lengths = zip(*values, strict=True)
    with matplotlib.rc_context({"svg.hashsalt": "dbsam", "font.size": 8, "svg.fonttype": "none"}):
        figure = figure_type(figsize=(9, 0.19 * len(values) + 0.8), layout="constrained")
        axis = figure.subplots()
        axis.barh(range(len(names)), lengths, color=colours)
        axis.set_yticks(range(len(names)), names)
        axis.margins(y=0.01)
        axis.invert_yaxis()
        if limit is not None:
            axis.axvline(limit, color=COLOURS[Verdict.FAIL], linewidth=1)
            axis.set_xlim(0, max(limit * 1.02, *lengths))
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        return svg_of(figure)


def _timing_rows(outcomes: Sequence[Judgement]) -> list[tuple[str, ...]]:
    """Operator, case, µs, GB/s and TFLOP/s with their shares."""
    rows: list[tuple[str, ...]] = []
    for one in outcomes:
        for name, row in one.figures.get("rows", {}).items():
            copied = f"{row['GB/s']:.4g} ({row['of copy']:.0%})"
            computed = f"{row['TFLOP/s']:.3g} ({row['of GEMM']:.0%})" if "TFLOP/s" in row else ""
            what = str(one.figures["what"])
            rows.append((one.check, name, what, f"{row['us']:.4g}", copied, computed))
    return rows
