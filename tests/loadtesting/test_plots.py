"""The page of a load test, also of a server that answered nothing."""

from __future__ import annotations

import pytest

from dbsam_deploy.loadtesting.generator import Tally
from dbsam_deploy.loadtesting.page import write_report
from dbsam_deploy.loadtesting.run import Load, LoadPoint

ABOUT = {"server": "one that sleeps", "date": "2026-11-30"}


def tally(latencies_ms: list[float], late: int = 0) -> Tally:
    found = Tally(seconds=4.0, right=len(latencies_ms), ended=len(latencies_ms), late=late)
    for latency_ms in latencies_ms:
        found.latencies.record_value(round(latency_ms * 1e3))
    return found


@pytest.mark.parametrize("clicks", [[], [40.0, 50.0]], ids=["none", "of one kind"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_what_was_not_answered_has_no_line_and_stops_no_page(tmp_path, clicks):
    points = [
        LoadPoint("click", "grpc", Load(concurrency=1), tally(clicks), None),
        LoadPoint("click", "grpc", Load(concurrency=4), tally([], late=4), None),
        LoadPoint("one-shot", "grpc", Load(concurrency=1), tally([], late=1), None),
    ]
    files = write_report(tmp_path, points, ABOUT, [])
    rows = files["loadtest.csv"].read_text().splitlines()
    assert len(rows) == 1 + len(points)
    plot = files["load.svg"].read_text()
    assert plot.count("latency, ms") == 2
    assert "nan" not in plot.lower()
