"""Slots end when their viewer goes, stands idle or dies, and never during a request."""

from __future__ import annotations

import asyncio

import pytest

from dbsam_deploy.viewer.leases import LeaseRules, Leases
from dbsam_deploy.viewer.refusal import NotServedError


class Work:
    closed = 0

    def close(self) -> None:
        self.closed += 1


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases(clock) -> Leases:
    return Leases(LeaseRules(slots=2, idle_s=600, liveness_s=60), Work, clock)


def status(leases: Leases, token: str | None) -> int:
    try:
        leases.find(token)
    except NotServedError as error:
        return error.status
    return 200


def test_a_silent_viewer_loses_its_slot_and_an_idle_one_too(leases, clock):
    silent, idle = leases.claim(), leases.claim()
    with pytest.raises(NotServedError, match="slots"):
        leases.claim()
    for _ in range(12):
        clock.now += 50
        leases.see(idle)
        leases.sweep()
    assert (status(leases, silent.token), status(leases, idle.token)) == (410, 200)
    assert leases.remaining_s(idle) == 0
    clock.now += 1
    assert status(leases, idle.token) == 410
    assert (silent.work.closed, idle.work.closed) == (1, 1)
    leases.claim()


def test_a_request_in_flight_keeps_the_slot_and_its_end_counts(leases, clock):
    lease = leases.claim()

    async def long_prompt() -> None:
        async with leases.acting(lease):
            clock.now += 5000
            leases.sweep()
            assert status(leases, lease.token) == 200

    asyncio.run(long_prompt())
    leases.sweep()
    assert leases.remaining_s(lease) == 600
    clock.now += 61
    assert status(leases, lease.token) == 410


def test_a_slot_given_back_in_flight_is_closed_at_the_end(leases):
    lease = leases.claim()

    async def released() -> None:
        async with leases.acting(lease):
            leases.release(lease.token)
            leases.release(lease.token)
            assert (len(leases), lease.work.closed) == (0, 0)
        assert lease.work.closed == 1
        with pytest.raises(NotServedError, match="given back"):
            async with leases.acting(lease):
                pass

    asyncio.run(released())
    assert status(leases, lease.token) == status(leases, None) == 410
    leases.release(None)


def test_without_a_liveness_limit_silence_is_no_fault(clock):
    leases = Leases(LeaseRules(liveness_s=0), Work, clock)
    lease = leases.claim()
    clock.now += 599
    assert status(leases, lease.token) == 200


def test_bytes_are_counted_over_all_slots_and_free_again(clock):
    leases = Leases(LeaseRules(image_bytes=100), Work, clock)
    one, other = leases.claim(), leases.claim()
    one.held_bytes = 60
    with leases.room(other) as take:
        take(40)
        with pytest.raises(NotServedError, match="memory"):
            take(1)
    assert (one.held_bytes, other.held_bytes) == (60, 0)
    leases.release(one.token)
    with leases.room(other) as take:
        take(100)
