"""One self-contained HTML page of a load test: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..extras import require
from ..files.atomic import write_file
from ..files.pages import render
from .plots import load_plot, tail_plot
from .run import LoadPoint
from .tables import LEGEND, SHORT, cells, csv_text, percentiles_csv

TEMPLATE = Path(__file__).with_name("report.html.jinja")
TEXT_COLUMNS = 3
"""The first columns hold words."""


def write_report(
    folder: Path, points: Sequence[LoadPoint], about: dict[str, str], notes: Sequence[str]
) -> dict[str, Path]:
    """Write the page, both CSV files and the plots.

    Args:
        folder: where.
        points: from `run.run_plan`.
        about: name → value, shown as given.
        notes: sentences that belong to the figures.

    Raises:
        MissingError: Matplotlib or Jinja2 is not installed.
        InputError: a file cannot be written.
    """
    jinja2 = require("jinja2", extra="loadtest", what_for="the page of a load test")
    plot, tail = load_plot(points), tail_plot(points)
    page = render(
        jinja2,
        TEMPLATE,
        about=about,
        notes=notes,
        plot=plot,
        tail=tail,
        headings=list(SHORT.values()),
        rows=[(cells(point), bool(point.tally.wrong or point.tally.failed)) for point in points],
        words=TEXT_COLUMNS,
        legend=LEGEND,
    )
    texts = {
        "loadtest.html": page,
        "loadtest.csv": csv_text(points),
        "percentiles.csv": percentiles_csv(points),
        "load.svg": plot,
        "tail.svg": tail,
    }
    return {name: write_file(folder / name, text.encode()) for name, text in texts.items()}
