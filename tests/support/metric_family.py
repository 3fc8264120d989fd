"""A metric of Triton's Python module, played."""

from __future__ import annotations


class Family:
    """The family, and the metric of model `m` in it; `values` has all of a process."""

    COUNTER, GAUGE = "counter", "gauge"
    values: dict[str, int] = {}  # noqa: RUF012 - emptied for each test

    def __init__(self, name, description, kind):
        self.name = name

    def Metric(self, labels):  # noqa: N802 - Triton's name
        assert labels == {"model": "m"}
        Family.values.setdefault(self.name, 0)
        return self

    def increment(self, by):
        Family.values[self.name] += by

    def set(self, value):
        Family.values[self.name] = value
