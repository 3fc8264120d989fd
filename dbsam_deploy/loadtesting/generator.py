"""Sends requests and times them: so many at a time, or so many a second whatever the answers do.

A closed loop (`at_a_time`) sends the next request when one is answered. When the server stalls it
asks less, so that the stall hardly shows in its percentiles ("coordinated omission"). An open loop
(`per_second`) sends by a clock, as independent users do, and counts a latency from the moment at
which the request was due.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import BusyError, DeadlineError, InputError, ServingError
from ..extras import require

LONGEST_US, DIGITS = 3_600_000_000, 3
"""What the histogram holds: up to an hour, to three significant digits."""
MOST_OPEN = 256
"""Requests that an open loop leaves unanswered at most; further ones are counted, not sent."""
_BUSY_PAUSE_S = 0.05

Sender = Callable[[int], Awaitable[bool]]
"""Sends request number n; whether its answer is the expected one."""


def new_histogram() -> Any:
    """An empty HDR histogram of latencies in microseconds.

    Raises:
        MissingError: hdrhistogram is not installed.
    """
    library = require("hdrh.histogram", extra="loadtest", what_for="a load test")
    return library.HdrHistogram(1, LONGEST_US, DIGITS)


@dataclass
class Tally:
    """What became of the requests that were sent, or due, in the measured time.

    Attributes:
        seconds: the measured time.
        latencies: HDR histogram of the right answers, in microseconds.
        right: answers as expected.
        wrong: other answers.
        shed: refused because the server is busy.
        late: not answered within the client's time limit.
        failed: ended otherwise, by kind of error.
        unsent: of an open loop, not sent because too many were open.
        ended: right answers that came in the measured time, whenever they were asked for.
    """

    seconds: float
    latencies: Any = field(default_factory=new_histogram)
    right: int = 0
    wrong: int = 0
    shed: int = 0
    late: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    unsent: int = 0
    ended: int = 0

    @property
    def throughput(self) -> float:
        """Right answers a second."""
        return self.ended / self.seconds

    @property
    def sent(self) -> int:
        """Requests that were sent."""
        return self.right + self.wrong + self.shed + self.late + self.failed.total()

    def latency_ms(self, percentile: float) -> float | None:
        """A percentile of the right answers' latencies; None without any."""
        if not self.right:
            return None
        return float(self.latencies.get_value_at_percentile(percentile)) / 1e3

    def mean_ms(self) -> float | None:
        """Mean latency of the right answers; None without any."""
        return float(self.latencies.get_mean_value()) / 1e3 if self.right else None


@dataclass(frozen=True)
class MeasuredTime:
    """The measured time, by `time.perf_counter`."""

    begins: float
    ends: float

    @classmethod
    def after(cls, warm_up_s: float, seconds: float) -> MeasuredTime:
        """`seconds` that begin once the warm-up is over."""
        begins = time.perf_counter() + warm_up_s
        return cls(begins, begins + seconds)

    def has(self, moment: float) -> bool:
        """Whether a moment lies in it."""
        return self.begins <= moment < self.ends


async def at_a_time(
    ask: Sender, concurrency: int, *, seconds: float, warm_up_s: float = 0.0
) -> Tally:
    """Keep `concurrency` requests under way.

    Requests before and after the measured time are sent, and not counted.

    Args:
        ask: sends one.
        concurrency: how many at a time.
        seconds: the measured time.
        warm_up_s: time before it.

    Raises:
        InputError: a request is refused as wrong; nothing was to be measured then.
    """
    tally, window = Tally(seconds), MeasuredTime.after(warm_up_s, seconds)
    numbers = iter(range(1, 1 << 62))

    async def user() -> None:
        while (start := time.perf_counter()) < window.ends:
            pause_s = await _one(ask, next(numbers), start, window, tally)
            await asyncio.sleep(pause_s)

    async with asyncio.TaskGroup() as users:
        for _ in range(concurrency):
            users.create_task(user())
    return tally


async def per_second(
    ask: Sender,
    rate: float,
    *,
    seconds: float,
    warm_up_s: float = 0.0,
    most_open: int = MOST_OPEN,
    seed: int = 0,
) -> Tally:
    """Send `rate` requests a second on average, at random intervals that ignore the answers.

    Args:
        ask: sends one.
        rate: requests a second; intervals are exponential, as of independent users.
        seconds: the measured time.
        warm_up_s: time before it.
        most_open: unanswered requests; one that is due while there are as many is not sent.
        seed: other intervals.

    Raises:
        InputError: see `at_a_time`.
    """
    tally, window = Tally(seconds), MeasuredTime.after(warm_up_s, seconds)
    draw = random.Random(seed)  # noqa: S311 - no secret
    due, number, under_way = time.perf_counter(), 0, 0

    async def user(number: int, due: float) -> None:
        nonlocal under_way
        try:
            await _one(ask, number, due, window, tally)
        finally:
            under_way -= 1

    async with asyncio.TaskGroup() as users:
        while True:
            due += draw.expovariate(rate)
            if due >= window.ends:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            number += 1
            if under_way < most_open:
                under_way += 1
                users.create_task(user(number, due))
            elif window.has(due):
                tally.unsent += 1
    return tally


async def _one(ask: Sender, number: int, start: float, window: MeasuredTime, tally: Tally) -> float:
    """Send one request and count how it ends; returns how long its user waits before the next."""
    pause_s, kind = 0.0, "right"
    try:
        if not await ask(number):
            kind = "wrong"
    except InputError:
        raise
    except BusyError as error:
        kind = "shed"
        pause_s = _BUSY_PAUSE_S if error.retry_after_s is None else error.retry_after_s
    except DeadlineError:
        kind = "late"
    except ServingError as error:
        kind, pause_s = type(error).__name__, _BUSY_PAUSE_S
    end = time.perf_counter()
    if kind == "right" and window.has(end):
        tally.ended += 1
    if window.has(start):
        _count(tally, kind, end - start)
    return pause_s


def _count(tally: Tally, kind: str, latency_s: float) -> None:
    if kind == "right":
        tally.right += 1
        tally.latencies.record_value(min(LONGEST_US, max(1, round(latency_s * 1e6))))
    elif kind == "wrong":
        tally.wrong += 1
    elif kind == "shed":
        tally.shed += 1
    elif kind == "late":
        tally.late += 1
    else:
        tally.failed[kind] += 1
