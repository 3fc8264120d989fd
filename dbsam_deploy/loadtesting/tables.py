"""Measurements as CSV and as a table: the same columns everywhere."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from .run import LoadPoint

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0)
COLUMNS: dict[str, Callable[[LoadPoint], Any]] = {
    "work": lambda point: point.work,
    "way": lambda point: point.way,
    "concurrency": lambda point: point.load.concurrency,
    "rate_per_s": lambda point: point.load.rate,
    "seconds": lambda point: point.tally.seconds,
    "sent": lambda point: point.tally.sent,
    "right": lambda point: point.tally.right,
    "wrong": lambda point: point.tally.wrong,
    "shed": lambda point: point.tally.shed,
    "late": lambda point: point.tally.late,
    "failed": lambda point: point.tally.failed.total(),
    "unsent": lambda point: point.tally.unsent,
    "per_second": lambda point: point.tally.throughput,
    "mean_ms": lambda point: point.tally.mean_ms(),
    "p50_ms": lambda point: point.tally.latency_ms(50),
    "p95_ms": lambda point: point.tally.latency_ms(95),
    "p99_ms": lambda point: point.tally.latency_ms(99),
    "max_ms": lambda point: point.tally.latency_ms(100),
    "queue_ms": LoadPoint.queue_ms,
    "encoder_ms": LoadPoint.encoder_ms,
    "decoder_ms": LoadPoint.decoder_ms,
    "encoded": LoadPoint.encoded,
    "core_ms": LoadPoint.core_ms,
}
"""Column of the CSV file → its value."""
SHORT = {
    "work": "work",
    "way": "way",
    "load": "load",
    "per_second": "a second",
    "p50_ms": "p50 ms",
    "p95_ms": "p95 ms",
    "p99_ms": "p99 ms",
    "queue_ms": "queue ms",
    "encoder_ms": "encoder ms",
    "decoder_ms": "decoder ms",
    "core_ms": "core ms",
    "right": "right",
    "wrong": "wrong",
    "shed": "shed",
    "late": "late",
    "failed": "failed",
}
"""Columns of the console's table and of the page, with their headings."""
LEGEND = (
    "Latencies are those of right answers, seen by the client; queue, encoder and decoder are the "
    "server's own, and core its CPU time (--server-pid), for each answered request. Shed: refused "
    "as busy; late: not answered within the time limit."
)


def csv_text(points: Sequence[LoadPoint]) -> str:
    """One row a measurement."""
    rows = [[_plain(value(point)) for value in COLUMNS.values()] for point in points]
    return _csv([list(COLUMNS), *rows])


def percentiles_csv(points: Sequence[LoadPoint]) -> str:
    """One row a measurement and percentile."""
    rows = [["work", "way", "load", "percentile", "latency_ms"]]
    for point in points:
        name = [point.work, point.way, str(point.load)]
        for percentile in PERCENTILES:
            latency = _plain(point.tally.latency_ms(percentile))
            rows.append([*name, f"{percentile:g}", latency])
    return _csv(rows)


def _csv(rows: list[list[str]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def cells(point: LoadPoint) -> list[str]:
    """A measurement's row of the short table."""
    return [_cell(point, name) for name in SHORT]


def _cell(point: LoadPoint, name: str) -> str:
    if name == "load":
        return str(point.load)
    value = COLUMNS[name](point)
    if isinstance(value, float):
        return f"{value:.2f}" if value < 10 else f"{value:.1f}"
    return "–" if value is None else str(value)


def result_table(points: Sequence[LoadPoint]) -> Table:
    """The console's table."""
    table = Table(box=box.SIMPLE_HEAD, caption=LEGEND)
    for name, heading in SHORT.items():
        left = name in ("work", "way", "load")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for point in points:
        table.add_row(*cells(point))
    return table


def one_line(point: LoadPoint) -> str:
    """A measurement in a line, for whoever watches."""
    tally = point.tally
    latency = "no right answer" if not tally.right else f"p50 {tally.latency_ms(50):.1f} ms"
    if tally.right:
        latency += f", p99 {tally.latency_ms(99):.1f} ms"
    others = {"wrong": tally.wrong, "shed": tally.shed, "late": tally.late, "unsent": tally.unsent}
    others |= tally.failed
    bad = "".join(f", {count} {kind}" for kind, count in others.items() if count)
    rate = f"{tally.throughput:.2f} a second"
    return f"{point.work} by {point.way}, {point.load}: {rate}, {latency}{bad}"
