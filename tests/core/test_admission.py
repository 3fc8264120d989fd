"""The bounded queue: what fits is done, the rest is refused with a time to try again."""

from __future__ import annotations

import re
import threading
import time

import pytest

from dbsam_deploy.core.admission import Admission, Limits
from dbsam_deploy.core.refusal import RefusedError


class Gate:
    """Jobs wait in `run` until it is opened."""

    def __init__(self) -> None:
        self.open, self.done, self.running = threading.Event(), [], threading.Semaphore(0)

    def run(self, job: str) -> None:
        self.running.release()
        assert self.open.wait(10)
        self.done.append(job)


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open.set()


def busy(gate: Gate, limits: Limits) -> Admission[str]:
    """An admission whose two lanes, of one thread each, are both at work."""
    admission = Admission[str](limits, {"slow": 1, "quick": 1}, gate.run)
    for lane in ("slow", "quick"):
        admission.submit(lane, f"first {lane}", 1)
        assert gate.running.acquire(timeout=10)
    return admission


def test_the_queue_is_bounded_and_says_so(gate):
    admission = busy(gate, Limits(2, 1 << 20))
    admission.submit("slow", "a", 1)
    admission.submit("quick", "b", 1)
    with pytest.raises(
        RefusedError, match=r"busy: 2 requests wait, at most 2 .*retry after 50 ms"
    ) as caught:
        admission.submit("slow", "c", 1)
    assert caught.value.code == "UNAVAILABLE"
    gate.open.set()
    admission.close(10)
    assert sorted(gate.done) == ["a", "b", "first quick", "first slow"]


def test_waiting_bytes_are_bounded_but_one_request_always_may_wait(gate):
    admission = busy(gate, Limits(100, 3 << 20))
    admission.submit("slow", "large", 5 << 20)
    with pytest.raises(RefusedError, match=r"1 requests wait with 6 MiB, at most 100 with 3 MiB"):
        admission.submit("quick", "another", 1 << 20)
    gate.open.set()
    admission.close(10)
    assert "large" in gate.done


def test_a_quick_lane_does_not_wait_for_a_slow_one():
    hold, done = threading.Event(), threading.Event()
    jobs = {"slow": lambda: hold.wait(10), "quick": done.set}
    admission = Admission[str](Limits(9, 9), {"slow": 1, "quick": 1}, lambda job: jobs[job]())
    admission.submit("slow", "slow", 0)
    admission.submit("slow", "slow", 0)
    admission.submit("quick", "quick", 0)
    assert done.wait(10)
    hold.set()
    admission.close(10)


def test_the_time_to_try_again_follows_what_jobs_take():
    started = threading.Semaphore(0)

    def run(_: str) -> None:
        started.release()
        time.sleep(0.2)

    admission = Admission[str](Limits(2, 9), {"slow": 1}, run)
    admission.submit("slow", "a", 0)
    admission.submit("slow", "b", 0)
    assert started.acquire(timeout=10)
    assert started.acquire(timeout=10)  # so the first was measured
    admission.submit("slow", "c", 0)
    admission.submit("slow", "d", 0)
    with pytest.raises(RefusedError) as caught:
        admission.submit("slow", "e", 0)
    wait_ms = int(re.search(r"after (\d+) ms", str(caught.value)).group(1))
    assert 2 * 200 <= wait_ms < 10_000
    admission.close(10)
