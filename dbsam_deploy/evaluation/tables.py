"""A result as text: cells that the console and the HTML page share, and the console's tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .calibration import BINS, Calibration, calibrate
from .published import AVERAGES, SOURCE, Comparison, PaperAverage, our_average
from .results import EvaluationResult, Interval, Mean, Score

BELOW = "▼"
LEGEND = (
    "in %; 95 % bootstrap intervals by drawing f files, c cases, o objects or t tasks; "
    f"box: the prompt itself, filled, as the mask; {BELOW} not above it"
)
NOT_OURS = (
    "Published figures were measured on the paper's own test images; ours come from other images "
    "of the same structure, so the two are not comparable case by case and are never averaged."
)
_SHOWN_FILES = 4


def percent(value: float | None) -> str:
    """0–1 as per cent with two digits; a dash for None."""
    return "–" if value is None else f"{100 * value:.2f}"


def interval_text(interval: Interval | None) -> str:
    """`low–high` in per cent and the letter of what was drawn; a dash for None."""
    if interval is None:
        return "–"
    return f"{100 * interval.low:.1f}–{100 * interval.high:.1f}{interval.unit[0]}"


def calibration_line(calibration: Calibration | None) -> str:
    """How far the predicted IoU can be believed, in one line; empty where there is none."""
    if calibration is None:
        return ""
    way = "too high" if calibration.bias > 0 else "too low"
    return (
        f"calibration: over {calibration.count} objects the predicted IoU is "
        f"{percent(calibration.error)} points off (expected calibration error, {BINS} bins), on "
        f"average {percent(abs(calibration.bias))} {way}"
    )


def flagging_rows(calibration: Calibration) -> list[tuple[str, ...]]:
    """Least confidence; share flagged; share of the poor ones among them; Dice of the rest."""
    return [
        (f"{one.least:g}", percent(one.flagged), percent(one.caught), percent(one.dsc_of_rest))
        for one in calibration.flaggings
    ]


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


def skipped_lines(result: EvaluationResult) -> list[str]:
    """What was left out, by reason, with the files."""
    by_reason: dict[str, list[tuple[str, int]]] = {}
    for item in result.skipped:
        by_reason.setdefault(item.reason, []).append((item.file, item.count))
    lines = []
    for reason, found in by_reason.items():
        files = ", ".join(f"{file} ({count})" for file, count in found[:_SHOWN_FILES])
        rest = len(found) - _SHOWN_FILES
        more = f" and {rest} more files" if rest > 0 else ""
        lines.append(f"{reason}: {sum(count for _, count in found)} in {files}{more}")
    return lines


def row_name(item: Comparison) -> str:
    """The paper's name of a task, starred where it could not be checked."""
    is_checked = item.row.dsc is not None or not item.row.is_papers
    return item.row.name if is_checked else f"{item.row.name} *"


def average_name(average: PaperAverage) -> str:
    """Whose average over what."""
    return f"{average.model}, all {average.tasks} {average.dimensions} tasks"


def published_cells(item: Comparison) -> tuple[str, ...]:
    """The paper's Dice of a task; of ours Dice, its interval, NSD, the box's Dice, and how many."""
    return (
        "–" if item.row.dsc is None else f"{item.row.dsc:.2f}",
        percent(item.ours.dsc),
        interval_text(item.interval),
        percent(item.ours.nsd),
        percent(item.ours.box_dsc),
        str(item.count),
    )


def average_rows(comparisons: Sequence[Comparison]) -> list[tuple[str, str, str, str]]:
    """What was published of whom, its Dice and NSD, and our average; only of tables with data."""
    shown = {item.row.dimensions for item in comparisons if item.row.is_papers}
    return [
        (
            average_name(average),
            f"{average.dsc:.2f}",
            f"{average.nsd:.2f}",
            percent(our_average(average.dimensions, comparisons)),
        )
        for average in AVERAGES
        if average.dimensions in shown
    ]


def tolerance_text(result: EvaluationResult) -> str:
    """Within what the NSD counts surfaces as found."""
    tolerances = sorted({case.tolerance for case in result.cases})
    units = sorted({tolerance.split()[-1] for tolerance in tolerances})
    hd95 = f"; HD95 in {' or '.join(units)}" if beside_cells(result, None)[:1] == ("HD95",) else ""
    return f"NSD within {' or '.join(tolerances)}{hd95}"


def published_notes(result: EvaluationResult) -> list[str]:
    """What must be read with the published figures."""
    notes = [
        NOT_OURS,
        f"Published: {SOURCE}; – no figure known, or not all of a table's tasks in our data; "
        "* name not checked against the paper.",
    ]
    if result.settings["protocol"] != "medsam":
        notes.append("The paper's own protocol is medsam.")
    return notes


def beside_cells(result: EvaluationResult, score: Score | None) -> tuple[str, ...]:
    """What the protocols `one-prompt` and `medsam` put beside the box: the columns' names for None.

    Empty for the other protocols.
    """
    if result.summary.tasks.score.hd95 is not None:
        if score is None:
            return ("HD95", "volume off")
        return ("–" if score.hd95 is None else f"{score.hd95:.1f}", percent(score.volume_error))
    if result.summary.tasks.score.oracle_dsc is None:
        return ()
    if score is None:
        return ("oracle", "of it", "cvpr24")
    oracle = score.oracle_dsc or 0.0
    share = f"{score.dsc / oracle:.2f}" if oracle else "–"
    return (percent(oracle), share, percent(score.cvpr24_dsc))


def print_result(
    console: Console, result: EvaluationResult, comparisons: Sequence[Comparison] | None
) -> None:
    """Print tasks, means and what was skipped; with `comparisons` the published figures, too."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    console.print(_task_table(result))
    for line in skipped_lines(result) or ["nothing"]:
        say(f"skipped: {line}")
    calibration = calibrate(result.objects)
    if calibration is not None:
        say(calibration_line(calibration))
    if comparisons is None:
        return
    if not comparisons:
        say("published: none of the rows has data here; see the head of rows.toml, and --rows")
        return
    console.print(_published_table(result, comparisons))
    for note in published_notes(result):
        say(note)


def _table(title: str, first: str, names: Sequence[str], caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _task_table(result: EvaluationResult) -> Table:
    """One row a task, then the means."""
    title = f"ours, protocol {result.settings['protocol']}"
    columns = ("n", "DSC", "95 %", "NSD", "box", *beside_cells(result, None), "")
    table = _table(title, "task", columns, f"{LEGEND}; {tolerance_text(result)}")
    for task in result.tasks:
        cells = (*_mean_cells(task.mean), *beside_cells(result, task.mean.score))
        table.add_row(escape(task.task), *cells, BELOW if task.below_box else "")
    table.add_section()
    for name, mean in summary_rows(result):
        table.add_row(name, *_mean_cells(mean), *beside_cells(result, mean.score))
    table.add_section()
    above = f"{result.summary.tasks_above_box} of {len(result.tasks)}"
    table.add_row("tasks above their box", "", above)
    return table


def _mean_cells(mean: Mean) -> tuple[str, ...]:
    score = mean.score
    figures = (percent(score.dsc), interval_text(mean.dsc_interval), percent(score.nsd))
    return (str(mean.count), *figures, percent(score.box_dsc))


def _published_table(result: EvaluationResult, comparisons: Sequence[Comparison]) -> Table:
    """The rows that have data, with ours beside the paper's, then its averages."""
    title = f"published DSC, and ours by the protocol {result.settings['protocol']}"
    columns = ("DB-SAM", "ours", "95 %", "NSD", "box", "n")
    table = _table(title, "task of the paper", columns)
    for dimensions in ("3D", "2D"):
        for item in comparisons:
            if item.row.dimensions == dimensions:
                table.add_row(escape(row_name(item)), *published_cells(item))
        table.add_section()
    for name, dsc, nsd, ours in average_rows(comparisons):
        table.add_row(f"{name} (NSD {nsd})", dsc, ours)
    return table
