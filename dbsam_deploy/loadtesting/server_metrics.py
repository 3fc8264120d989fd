"""Triton's own counters: how long requests wait in its queues, and how long models compute."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from dataclasses import dataclass

from ..core.errors import ServingError

_LINE = re.compile(r'^(nv_inference_\w+)\{[^}]*\bmodel="([^"]+)"[^}]*\} ([0-9.eE+]+)$', re.M)
_COUNTERS = {
    "nv_inference_exec_count": "executions",
    "nv_inference_queue_duration_us": "queue_us",
    "nv_inference_compute_infer_duration_us": "compute_us",
}
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Counters:
    """One model's counters, or how much they grew.

    Attributes:
        executions: how often it ran; one may answer several requests.
        queue_us: time that requests waited for it, in microseconds.
        compute_us: time that it computed, in microseconds; of a model that asks others with theirs.
    """

    executions: float = 0.0
    queue_us: float = 0.0
    compute_us: float = 0.0

    def since(self, before: Counters) -> Counters:
        """How much they grew."""
        return Counters(
            self.executions - before.executions,
            self.queue_us - before.queue_us,
            self.compute_us - before.compute_us,
        )


def read_counters(url: str) -> dict[str, Counters]:
    """Each model's counters.

    Args:
        url: host:port of the server's metrics.

    Raises:
        ServingError: they cannot be read.
    """
    try:
        with urllib.request.urlopen(f"http://{url}/metrics", timeout=_TIMEOUT_S) as answer:
            text = answer.read().decode()
    except (OSError, ValueError) as error:
        raise ServingError(
            f"no metrics on {url} ({error}): give --metrics-url host:port of the server's, or "
            "--metrics-url none to measure without them"
        ) from error
    return parse_counters(text)


def parse_counters(text: str) -> dict[str, Counters]:
    """Each model's counters in Prometheus' text format."""
    found: dict[str, dict[str, float]] = {}
    for name, model, value in _LINE.findall(text):
        if name in _COUNTERS:
            values = found.setdefault(model, {})
            values[_COUNTERS[name]] = values.get(_COUNTERS[name], 0.0) + float(value)
    return {model: Counters(**values) for model, values in found.items()}


def growth(before: dict[str, Counters], after: dict[str, Counters]) -> dict[str, Counters]:
    """How much each model's counters grew."""
    return {model: now.since(before.get(model, Counters())) for model, now in after.items()}
