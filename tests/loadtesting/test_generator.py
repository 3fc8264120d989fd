"""Closed and open loops: what is sent, when, and what is counted as what."""

from __future__ import annotations

import asyncio
import time

import pytest

from dbsam_deploy.core.errors import BusyError, DeadlineError, InputError, NoServerError
from dbsam_deploy.loadtesting.generator import Tally, at_a_time, per_second


class Server:
    """Answers after `pause_s`; raises what is planned for a request's number."""

    def __init__(self, pause_s: float = 0.01, planned=None) -> None:
        self.pause_s, self.planned = pause_s, planned or {}
        self.open, self.most_open, self.asked = 0, 0, 0

    async def __call__(self, number: int) -> bool:
        self.asked += 1
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        try:
            await asyncio.sleep(self.pause_s)
            outcome = self.planned.get(number, True)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        finally:
            self.open -= 1


def test_a_closed_loop_keeps_so_many_under_way():
    server = Server()
    tally = asyncio.run(at_a_time(server, 5, seconds=0.3))
    assert server.most_open == 5
    assert tally.sent == tally.right == server.asked
    assert tally.throughput == pytest.approx(tally.ended / 0.3)
    assert 10 <= tally.latency_ms(50) < 100
    assert tally.latency_ms(50) <= tally.latency_ms(99) <= tally.latency_ms(100)


def test_the_warm_up_is_not_counted():
    server = Server()
    tally = asyncio.run(at_a_time(server, 2, seconds=0.15, warm_up_s=0.15))
    assert 0 < tally.sent < server.asked


def test_every_end_is_counted_apart():
    planned = {
        1: False,
        2: BusyError("busy", 0.0),
        3: DeadlineError("late"),
        4: NoServerError("gone"),
        5: NoServerError("gone"),
    }
    tally = asyncio.run(at_a_time(Server(0.001, planned), 1, seconds=0.3))
    assert (tally.wrong, tally.shed, tally.late) == (1, 1, 1)
    assert tally.failed == {"NoServerError": 2}
    assert tally.sent == tally.right + 5
    assert tally.latencies.get_total_count() == tally.right


def test_a_refused_user_waits_as_long_as_told():
    planned = {number: BusyError("busy", 0.1) for number in range(99)}
    server = Server(0.0, planned)
    tally = asyncio.run(at_a_time(server, 1, seconds=0.25))
    assert tally.shed == server.asked == 3
    assert tally.latency_ms(50) is None
    assert tally.mean_ms() is None


def test_a_mistake_ends_the_test():
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(at_a_time(Server(0.001, {3: InputError("box 0")}), 2, seconds=5))
    assert caught.group_contains(InputError, match="box 0")


async def stalled_once(loop_of):
    """A server that answers in 1 ms, but stands still for 300 ms in between."""
    begin = time.perf_counter()

    async def answer(number: int) -> bool:
        at = time.perf_counter() - begin
        await asyncio.sleep(0.001 + max(0.0, 0.4 - at) * (at > 0.1))
        return True

    return await loop_of(answer)


def test_an_open_loop_sees_the_stall_that_a_closed_one_hides():
    """Coordinated omission: who waits for each answer asks seldom while nothing comes."""
    hidden = asyncio.run(stalled_once(lambda ask: at_a_time(ask, 1, seconds=0.8)))
    seen = asyncio.run(stalled_once(lambda ask: per_second(ask, 200, seconds=0.8)))
    assert hidden.latency_ms(95) < 50
    assert seen.latency_ms(90) > 100


def test_a_latency_counts_from_the_moment_when_a_request_was_due():
    """Also where the client itself comes late to send it."""
    late = []

    async def answer(number: int) -> bool:
        if not late:
            late.append(number)
            time.sleep(0.3)
        return True

    tally = asyncio.run(per_second(answer, 200, seconds=0.6))
    assert tally.right > 60
    assert tally.latency_ms(70) > 30


def test_an_open_loop_sends_by_the_clock():
    tally = asyncio.run(per_second(Server(0.05), 200, seconds=0.5))
    assert 60 < tally.sent < 140
    again = asyncio.run(per_second(Server(0.05), 200, seconds=0.5))
    assert again.sent == tally.sent


def test_an_open_loop_leaves_out_what_would_pile_up():
    server = Server(0.2)
    tally = asyncio.run(per_second(server, 500, seconds=0.3, most_open=4))
    assert server.most_open == 4
    assert tally.unsent > 50
    assert tally.sent == server.asked


def test_latencies_have_three_digits():
    tally = Tally(1.0)
    for latency_us in range(1000, 101_000, 100):
        tally.right += 1
        tally.latencies.record_value(latency_us)
    assert tally.latency_ms(50) == pytest.approx(51, rel=2e-3)
    assert tally.latency_ms(99) == pytest.approx(100, rel=2e-3)
