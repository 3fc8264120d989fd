"""Triton's own counters: how long requests wait in its queues, and how long models compute."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..core.bls import public_name
from ..core.errors import ServingError
from ..core.front_metrics import CANCELLED, LATE, QUEUE_US, SHED
from ..serving.control import metrics

_LINE = re.compile(r'^(\w+)\{[^}]*\bmodel="([^"]+)"[^}]*\} ([0-9.eE+]+)$', re.M)
_COUNTERS = {
    "nv_inference_request_success": ("answered", 1),
    SHED: ("answered", -1),  # Triton counts an error that the front model sends as an answer
    CANCELLED: ("answered", -1),
    LATE: ("answered", -1),
    "nv_inference_queue_duration_us": ("queue_us", 1),
    QUEUE_US: ("queue_us", 1),  # the front model has a queue of its own behind Triton's
    "nv_inference_compute_infer_duration_us": ("compute_us", 1),
}
"""Metric → the attribute that it is a part of, and its sign."""


@dataclass(frozen=True)
class ModelCounters:
    """One model's counters, or how much they grew.

    Attributes:
        answered: requests that it answered, refusals not among them.
        queue_us: time that requests waited for it, in microseconds.
        compute_us: time that it computed, in microseconds; of a model that asks others with theirs.
    """

    answered: float = 0.0
    queue_us: float = 0.0
    compute_us: float = 0.0

    def since(self, before: ModelCounters) -> ModelCounters:
        """How much they grew."""
        return ModelCounters(
            self.answered - before.answered,
            self.queue_us - before.queue_us,
            self.compute_us - before.compute_us,
        )


def read_counters(url: str) -> dict[str, ModelCounters]:
    """Each model's counters.

    Args:
        url: host:port of the server's metrics.

    Raises:
        ServingError: they cannot be read.
    """
    try:
        return parse_counters(metrics(url))
    except ServingError as error:
        raise ServingError(
            f"{error}: give --metrics-url host:port of the server's, or --metrics-url none to "
            "measure without them"
        ) from error


def parse_counters(text: str) -> dict[str, ModelCounters]:
    """Each model's counters in Prometheus' text format."""
    found: dict[str, dict[str, float]] = {}
    for name, model, value in _LINE.findall(text):
        if name in _COUNTERS:
            values = found.setdefault(public_name(model), {})
            attribute, sign = _COUNTERS[name]
            values[attribute] = values.get(attribute, 0.0) + sign * float(value)
    return {model: ModelCounters(**values) for model, values in found.items()}


def growth(
    before: dict[str, ModelCounters], after: dict[str, ModelCounters]
) -> dict[str, ModelCounters]:
    """How much each model's counters grew."""
    return {model: now.since(before.get(model, ModelCounters())) for model, now in after.items()}
