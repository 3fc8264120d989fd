"""A bounded queue in front of worker threads: what does not fit is refused at once.

Lanes keep quick work from waiting behind slow work: each has its own threads, and all lanes share
the bounds.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from .refusal import RefusedError

_LEAST_RETRY_S = 0.05
_SMOOTHING = 0.2
"""Weight of the latest job in a lane's mean time."""

Job = TypeVar("Job")


@dataclass(frozen=True)
class Limits:
    """What may wait at most: requests, and bytes of their arrays."""

    waiting: int
    nbytes: int


@dataclass(eq=False)
class _Lane(Generic[Job]):
    workers: int
    jobs: deque[tuple[Job, int]] = field(default_factory=deque)
    mean_s: float = 0.0


class Admission(Generic[Job]):
    """Takes jobs and runs them in threads.

    Args:
        limits: beyond these a job is refused. A job that finds a free worker does not wait.
        workers: lane → number of threads.
        run: does one job; it must not raise.
    """

    def __init__(
        self, limits: Limits, workers: Mapping[str, int], run: Callable[[Job], None]
    ) -> None:
        self._limits, self._run = limits, run
        self._lanes = {name: _Lane[Job](count) for name, count in workers.items()}
        self._ready = threading.Condition()
        self._waiting = self._nbytes = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"{name}-{index}", daemon=True)
            for name, lane in self._lanes.items()
            for index in range(lane.workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, lane: str, job: Job, nbytes: int) -> None:
        """Take a job.

        Args:
            lane: whose threads do it.
            job: what `run` gets.
            nbytes: memory that it holds while it waits.

        Raises:
            RefusedError: too much waits already, with the time after which to try again.
        """
        with self._ready:
            queue = self._lanes[lane]
            full = self._waiting >= self._limits.waiting
            # One request of any legal size is taken when nothing waits.
            if full or (self._waiting and self._nbytes + nbytes > self._limits.nbytes):
                wait_s = max(_LEAST_RETRY_S, len(queue.jobs) * queue.mean_s / queue.workers)
                held = "" if full else f" with {(self._nbytes + nbytes) >> 20} MiB"
                raise RefusedError(
                    f"busy: {self._waiting} requests wait{held}, at most {self._limits.waiting} "
                    f"with {self._limits.nbytes >> 20} MiB; retry after {wait_s * 1000:.0f} ms",
                    "UNAVAILABLE",
                )
            queue.jobs.append((job, nbytes))
            self._waiting += 1
            self._nbytes += nbytes
            self._ready.notify_all()

    def close(self, timeout_s: float) -> None:
        """Take nothing more and wait for the threads to finish what waits."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self, lane: _Lane[Job]) -> None:
        while True:
            with self._ready:
                while not lane.jobs:
                    if self._closed:
                        return
                    self._ready.wait()
                job, nbytes = lane.jobs.popleft()
                self._waiting -= 1
                self._nbytes -= nbytes
            start = time.monotonic()
            self._run(job)
            del job  # its arrays are memory of the server
            with self._ready:
                elapsed = time.monotonic() - start
                lane.mean_s += (elapsed - lane.mean_s) * (_SMOOTHING if lane.mean_s else 1.0)
