"""Console tables of a result."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .published import AVERAGES, SOURCE, Comparison
from .results import EvaluationResult, Interval, Mean, Score

BELOW = "below its box"
NOT_OURS = (
    "Published figures were measured on the paper's own test images; ours come from other images "
    "of the same structure, so the two are not comparable case by case and are never averaged."
)


def percent(value: float | None) -> str:
    """0–1 as per cent with two digits; a dash for None."""
    return "–" if value is None else f"{100 * value:.2f}"


def interval_text(interval: Interval | None) -> str:
    """`low–high` in per cent, with a mark for what was drawn; a dash for None."""
    if interval is None:
        return "–"
    mark = {"files": " f", "cases": " c", "objects": " o", "tasks": " t"}[interval.unit]
    return f"{100 * interval.low:.1f}–{100 * interval.high:.1f}{mark}"


def print_result(
    console: Console, result: EvaluationResult, comparisons: tuple[Comparison, ...]
) -> None:
    """Print tasks, means, what was skipped, and the published figures."""
    console.print(task_table(result))
    console.print(summary_table(result))
    _print_skipped(console, result)
    console.print(published_table(result, comparisons))
    for line in published_notes(result):
        console.print(line, highlight=False, soft_wrap=True)


def task_table(result: EvaluationResult) -> Table:
    """One row a task: ours, the box's own figures, and whether ours is below them."""
    settings = result.settings
    table = Table(
        title=f"protocol {settings['protocol']}, Dice and NSD in %",
        caption="95 % bootstrap intervals by drawing f files, c cases, o objects or t tasks; "
        "box: the prompt itself, filled, as the mask",
    )
    table.add_column("task", overflow="fold")
    table.add_column("", no_wrap=True)
    for name in ("cases", "objects", "DSC", "interval", "NSD", "interval", "box DSC", "box NSD"):
        table.add_column(name, justify="right")
    table.add_column("")
    for task in result.tasks:
        mark = BELOW if task.below_box else ""
        cells = (str(task.cases), str(task.objects), *_figures(task.mean), mark)
        table.add_row(escape(task.task), task.dimensions, *cells, style="red" if mark else None)
    return table


def _figures(mean: Mean) -> tuple[str, ...]:
    score = mean.score
    return (
        percent(score.dsc),
        interval_text(mean.dsc_interval),
        percent(score.nsd),
        interval_text(mean.nsd_interval),
        percent(score.box_dsc),
        percent(score.box_nsd),
    )


def summary_rows(result: EvaluationResult) -> list[tuple[str, Mean]]:
    """The means that exist, with their names."""
    summary = result.summary
    rows = [
        ("mean over objects", summary.objects),
        ("mean over cases", summary.cases),
        ("mean over tasks", summary.tasks),
        ("mean over 3D tasks", summary.tasks_3d),
        ("mean over 2D tasks", summary.tasks_2d),
    ]
    return [(name, mean) for name, mean in rows if mean is not None]


def summary_table(result: EvaluationResult) -> Table:
    """Means over everything."""
    table = Table(
        caption=f"{result.summary.tasks_above_box} of {len(result.tasks)} tasks above their box's "
        "own Dice"
    )
    table.add_column("ours")
    for name in ("of", "DSC", "interval", "NSD", "interval", "box DSC", "box NSD"):
        table.add_column(name, justify="right")
    for name, mean in summary_rows(result):
        table.add_row(name, str(mean.count), *_figures(mean))
    return table


def skipped_lines(result: EvaluationResult) -> list[str]:
    """What was left out, by reason, with the files."""
    by_reason: dict[str, list[tuple[str, int]]] = {}
    for item in result.skipped:
        by_reason.setdefault(item.reason, []).append((item.file, item.count))
    lines = []
    for reason, found in by_reason.items():
        files = ", ".join(f"{file} ({count})" for file, count in found[:4])
        more = f" and {len(found) - 4} more files" if len(found) > 4 else ""
        lines.append(f"{reason}: {sum(count for _, count in found)} in {files}{more}")
    return lines


def _print_skipped(console: Console, result: EvaluationResult) -> None:
    for line in skipped_lines(result) or ["nothing"]:
        console.print(f"skipped: {line}", markup=False, highlight=False)


def published_notes(result: EvaluationResult) -> list[str]:
    """What must be read with the published figures."""
    notes = [NOT_OURS, f"published: {SOURCE}; * name not verified against the paper"]
    if result.settings["protocol"] != "medsam":
        notes.append("the paper's own protocol is --protocol medsam")
    return notes


def published_rows(comparisons: tuple[Comparison, ...]) -> list[tuple[str, ...]]:
    """Row name, published DSC, our DSC, interval, NSD, box DSC, number and task, as text."""
    rows = []
    for item in comparisons:
        row, ours = item.row, item.ours
        name = row.name if row.confirmed else f"{row.name} *"
        printed = "not known" if row.db_sam_dsc is None else f"{row.db_sam_dsc:.2f}"
        rows.append((row.dimensions, name, printed, *_our_cells(item, ours)))
    return rows


def _our_cells(item: Comparison, ours: Score | None) -> tuple[str, ...]:
    if ours is None:
        return ("no data", "", "", "", "")
    low_high = item.interval
    interval = "–" if low_high is None else f"{100 * low_high[0]:.1f}–{100 * low_high[1]:.1f}"
    about = f"{item.count} in {item.task}"
    return (percent(ours.dsc), interval, percent(ours.nsd), percent(ours.box_dsc), about)


def published_table(result: EvaluationResult, comparisons: tuple[Comparison, ...]) -> Table:
    """The paper's 21 3D and 9 2D tasks with ours beside them, then its averages."""
    table = Table(
        title=f"published figures, and ours by the protocol {result.settings['protocol']}"
    )
    table.add_column("", no_wrap=True)
    table.add_column("task of the paper", overflow="fold")
    for name in ("DB-SAM DSC", "our DSC", "interval", "our NSD", "box DSC"):
        table.add_column(name, justify="right")
    table.add_column("our data", overflow="fold")
    for cells in published_rows(comparisons):
        table.add_row(*(escape(cell) for cell in cells))
    table.add_section()
    for average in AVERAGES:
        name = f"{average.model}, mean of all {average.tasks} tasks"
        printed = f"{average.dsc:.2f} (NSD {average.nsd:.2f})"
        table.add_row(
            average.dimensions, name, printed, our_average(average.dimensions, comparisons)
        )
    return table


def our_average(dimensions: str, comparisons: tuple[Comparison, ...]) -> str:
    """Our mean over the paper's tasks, only if there is data for every one of them."""
    own = [item.ours for item in comparisons if item.row.dimensions == dimensions]
    filled = [score for score in own if score is not None]
    if len(filled) < len(own):
        return f"no data ({len(filled)} of {len(own)} tasks)"
    return percent(sum(score.dsc for score in filled) / len(filled))
