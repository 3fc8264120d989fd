"""The front model's Prometheus metrics, beside Triton's own at /metrics."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

REQUESTS = "dbsam_requests_total"
SHED = "dbsam_requests_shed_total"
CANCELLED = "dbsam_requests_cancelled_total"
LATE = "dbsam_requests_late_total"
IN_FLIGHT = "dbsam_requests_in_flight"
QUEUE_US = "dbsam_queue_microseconds_total"
CACHE_METRICS = {
    "hits": "dbsam_cache_hits_total",
    "misses": "dbsam_cache_misses_total",
    "joined": "dbsam_cache_joined_total",
    "evictions": "dbsam_cache_evictions_total",
    "images": "dbsam_cache_images",
    "nbytes": "dbsam_cache_bytes",
}
"""`embedding_cache.CacheCounts`' attribute → the metric it is told as."""

_COUNTERS = {
    REQUESTS: "Requests that reached the front model",
    SHED: "Requests refused because too many waited or the server stops",
    CANCELLED: "Requests dropped because their client had gone",
    LATE: "Requests dropped because their deadline had passed",
    QUEUE_US: "Time that requests waited for a worker",
    CACHE_METRICS["hits"]: "Embeddings that were kept",
    CACHE_METRICS["misses"]: "Embeddings that were computed",
    CACHE_METRICS["joined"]: "Requests that waited for the embedding of another one",
    CACHE_METRICS["evictions"]: "Embeddings dropped to stay within the budget",
}
_GAUGES = {
    IN_FLIGHT: "Requests taken and not answered yet",
    CACHE_METRICS["images"]: "Embeddings kept now",
    CACHE_METRICS["nbytes"]: "Bytes of the embeddings kept now",
}


class FrontMetrics:
    """Tells Triton the values that changed.

    Args:
        triton: `triton_python_backend_utils`.
        model: value of the label `model`.
    """

    def __init__(self, triton: Any, model: str) -> None:
        self._lock = threading.Lock()
        self._told = dict.fromkeys([*_COUNTERS, *_GAUGES], 0)
        self._families, self._metrics = {}, {}
        for kind, names in (("COUNTER", _COUNTERS), ("GAUGE", _GAUGES)):
            for name, description in names.items():
                family = triton.MetricFamily(
                    name=name, description=description, kind=getattr(triton.MetricFamily, kind)
                )
                self._families[name] = family
                self._metrics[name] = family.Metric(labels={"model": model})
        for name in _GAUGES:
            self._metrics[name].set(0)

    def tell(self, values: Callable[[], Mapping[str, int]]) -> None:
        """Bring Triton's values up to these, which never fall for counters.

        Args:
            values: the values now; asked for when no other thread is telling older ones.
        """
        with self._lock:
            for name, value in values().items():
                change = value - self._told[name]
                if name in _GAUGES and change:
                    self._metrics[name].set(value)
                elif change > 0:
                    self._metrics[name].increment(change)
                else:
                    continue
                self._told[name] = value
