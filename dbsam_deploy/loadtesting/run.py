"""Every kind of work, by every way, under every load: one `LoadPoint` each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from ..core.bls import MODEL_STEM
from ..core.contract import Geometry, graph_specs, interactive_spec
from ..prediction.predictor import Promptable
from .cpu_time import cpu_seconds
from .generator import Sender, Tally, at_a_time, per_second
from .server_metrics import ModelCounters, growth, read_counters
from .work import Connection, Subject, Way, Work, find_expected, prepare

ENCODER, *_DECODERS = (MODEL_STEM + name for name in graph_specs(Geometry(1024)))
_FRONT = interactive_spec(1).name


@dataclass(frozen=True)
class Load:
    """Requests at a time, or a second; one of them."""

    concurrency: int | None = None
    rate: float | None = None

    @property
    def amount(self) -> float:
        """The number that is on the axis of a plot."""
        return float(self.concurrency or self.rate or 0)

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} a second"
        return f"{self.concurrency} at a time"


@dataclass(frozen=True, eq=False)
class LoadPlan:
    """What is measured.

    Attributes:
        connection: the server.
        metrics_url: host:port of its metrics, or None to do without.
        subject: image and prompts.
        works: kinds of work.
        ways: how requests go.
        loads: how many.
        seconds: measured time of each.
        warm_up_s: time before it.
        local: the same model in this process, to compare with, or None.
        server_pid: the server's process, if it is on this machine, or None.
    """

    connection: Connection
    metrics_url: str | None
    subject: Subject
    works: tuple[Work, ...]
    ways: tuple[Way, ...]
    loads: tuple[Load, ...]
    seconds: float
    warm_up_s: float
    local: Promptable | None = None
    server_pid: int | None = None

    def points(self) -> int:
        """How many measurements there are."""
        return len(self.works) * len(self.ways) * len(self.loads)


@dataclass(frozen=True, eq=False)
class LoadPoint:
    """One measurement.

    Attributes:
        work: what was asked.
        way: how.
        load: how much.
        tally: what became of it.
        server: growth of each model's counters, warm-up included; None without metrics.
        cpu_s: CPU time of the server meanwhile; None where its process is not known.
    """

    work: Work
    way: str
    load: Load
    tally: Tally
    server: dict[str, ModelCounters] | None
    cpu_s: float | None = None

    def core_ms(self) -> float | None:
        """CPU time of the server for each answered request, in milliseconds."""
        answered = (self.server or {}).get(_FRONT, ModelCounters()).answered
        return None if self.cpu_s is None or not answered else self.cpu_s / answered * 1e3

    def queue_ms(self) -> float | None:
        """Time in the server's queues for each answered request, of all models together."""
        return self._each(lambda one: one.queue_us, _FRONT, ENCODER, *_DECODERS)

    def encoder_ms(self) -> float | None:
        """Time of the encoder for each request."""
        return self._each(lambda one: one.compute_us, ENCODER)

    def decoder_ms(self) -> float | None:
        """Time of the decoders for each request."""
        return self._each(lambda one: one.compute_us, *_DECODERS)

    def encoded(self) -> int | None:
        """Images that the encoder was given."""
        if self.server is None:
            return None
        return int(self.server.get(ENCODER, ModelCounters()).answered)

    def _each(self, value: Callable[[ModelCounters], float], *models: str) -> float | None:
        answered = (self.server or {}).get(_FRONT, ModelCounters()).answered
        if not self.server or not answered:
            return None
        total = sum(value(self.server.get(model, ModelCounters())) for model in models)
        return total / answered / 1e3


def run_plan(plan: LoadPlan, report: Callable[[LoadPoint], None]) -> tuple[list[LoadPoint], str]:
    """Measure everything.

    Args:
        plan: what.
        report: called with each point when it is measured.

    Returns:
        The points, and what the answers were compared with.

    Raises:
        ServingError: no server, or wrong answers before anything was timed.
        InputError: a request that the server refuses as wrong.
    """
    return asyncio.run(_run(plan, report))


async def _run(plan: LoadPlan, report: Callable[[LoadPoint], None]) -> tuple[list[LoadPoint], str]:
    points = []
    async with plan.connection.open(plan.ways[0]) as client:
        expected = await find_expected(client, plan.subject, plan.local)
    for way in plan.ways:
        async with plan.connection.open(way) as client:
            for work in plan.works:
                ask = await prepare(work, client, plan.subject, expected)
                for load in plan.loads:
                    points.append(await _measure(plan, work, way, load, ask))
                    report(points[-1])
    return points, expected.checked


async def _measure(plan: LoadPlan, work: Work, way: Way, load: Load, ask: Sender) -> LoadPoint:
    def cpu_s() -> float:
        return 0.0 if plan.server_pid is None else cpu_seconds(plan.server_pid)

    before, begun_s = _counters(plan), cpu_s()
    tally = await _loaded(ask, load, plan)
    used_s, after = cpu_s() - begun_s, _counters(plan)
    server = None if after is None else growth(before or {}, after)
    return LoadPoint(
        work, way.name, load, tally, server, None if plan.server_pid is None else used_s
    )


async def _loaded(ask: Sender, load: Load, plan: LoadPlan) -> Tally:
    seconds, warm_up_s = plan.seconds, plan.warm_up_s
    if load.concurrency is not None:
        return await at_a_time(ask, load.concurrency, seconds=seconds, warm_up_s=warm_up_s)
    return await per_second(ask, load.amount, seconds=seconds, warm_up_s=warm_up_s)


def _counters(plan: LoadPlan) -> dict[str, ModelCounters] | None:
    return None if plan.metrics_url is None else read_counters(plan.metrics_url)
