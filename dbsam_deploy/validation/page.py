"""One self-contained HTML page of a validation: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..extras import require
from ..files.atomic import write_file
from ..files.pages import render
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
_FOR = "the page of a validation"


def check_libraries() -> None:
    """Refuse before a long run what would fail in it.

    Raises:
        MissingError: Matplotlib or Jinja2 is not installed.
    """
    require("matplotlib", extra="validate", what_for=_FOR)
    require("jinja2", extra="validate", what_for=_FOR)


def write_page(folder: Path, record: Findings, order: Mapping[tuple[str, str], int]) -> Path:
    """Write `report.html`, whole, and return its path.

    Args:
        folder: of the report.
        record: what to show.
        order: step and check → place.

    Raises:
        MissingError: Matplotlib or Jinja2 is not installed.
        InputError: it cannot be written.
    """
    jinja2 = require("jinja2", extra="validate", what_for=_FOR)
    outcomes = sorted(record.outcomes, key=lambda one: order.get((one.step, one.check), -1))
    page = render(
        jinja2,
        TEMPLATE,
        record=record,
        counts=record.counts(),
        inputs=record.inputs,
        outcomes=outcomes,
        plots=_plots(outcomes),
        rows=_timing_rows(outcomes),
    )
    return write_file(folder / PAGE_NAME, page.encode())


def _plots(outcomes: list[Judgement]) -> list[tuple[str, str]]:
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
    seconds = {f"{o.step}: {o.check}": o.seconds for o in outcomes if o.seconds >= 0.5}
    colours = [COLOURS[o.verdict] for o in outcomes if o.seconds >= 0.5]
    plots = []
    if errors:
        plots.append(("Error of the kernels, as a share of what is allowed", _bars(errors, 1.0)))
    if speeds:
        plots.append(("Share of the nearer ceiling: memory, or GEMM", _bars(speeds, 1.0)))
    if seconds:
        plots.append(("Seconds of each check", _bars(seconds, None, colours)))
    return plots


def _bars(values: Mapping[str, float], limit: float | None, colours: Any = None) -> str:
    """Horizontal bars as SVG, the first on top; a line at `limit`."""
    figure_type = require("matplotlib.figure", extra="validate", what_for=_FOR).Figure
    matplotlib = require("matplotlib", extra="validate", what_for=_FOR)
    with matplotlib.rc_context({"svg.hashsalt": "dbsam", "font.size": 8, "svg.fonttype": "none"}):
        figure = figure_type(figsize=(9, 0.19 * len(values) + 0.8), layout="constrained")
        axis = figure.subplots()
        names = list(values)
        axis.barh(range(len(names)), list(values.values()), color=colours or COLOURS[Verdict.PASS])
        axis.set_yticks(range(len(names)), names)
        axis.margins(y=0.01)
        axis.invert_yaxis()
        if limit is not None:
            axis.axvline(limit, color=COLOURS[Verdict.FAIL], linewidth=1)
            axis.set_xlim(0, max(limit * 1.02, *values.values()))
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _timing_rows(outcomes: list[Judgement]) -> list[tuple[str, ...]]:
    """Operator, case, µs, GB/s and TFLOP/s with their shares."""
    rows: list[tuple[str, ...]] = []
    for one in outcomes:
        for name, row in one.figures.get("rows", {}).items():
            copied = f"{row['GB/s']:.4g} ({row['of copy']:.0%})"
            computed = f"{row['TFLOP/s']:.3g} ({row['of GEMM']:.0%})" if "TFLOP/s" in row else ""
            what = str(one.figures["what"])
            rows.append((one.check, name, what, f"{row['us']:.4g}", copied, computed))
    return rows
