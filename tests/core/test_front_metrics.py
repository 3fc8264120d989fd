"""What the front model tells Triton when several of its threads tell it."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from support.metric_family import Family

from dbsam_deploy.core.front_metrics import IN_FLIGHT, FrontMetrics


def test_an_older_value_is_never_told_after_a_newer_one():
    """Or requests that were answered long ago seem to be in flight, and a server waits for them."""
    metrics = FrontMetrics(SimpleNamespace(MetricFamily=Family), "m")
    asked, go, now = threading.Event(), threading.Event(), [3]

    def slowly():
        value = now[0]
        asked.set()
        go.wait(5)
        return {IN_FLIGHT: value}

    first = threading.Thread(target=metrics.tell, args=(slowly,))
    first.start()
    asked.wait(5)
    now[0] = 0
    second = threading.Thread(target=metrics.tell, args=(lambda: {IN_FLIGHT: now[0]},))
    second.start()
    second.join(0.1)
    go.set()
    first.join()
    second.join()
    assert Family.values[IN_FLIGHT] == 0
