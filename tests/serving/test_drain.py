"""When a server has answered, told by sockets of this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.serving import wait_until

from dbsam_deploy.serving import drain
from dbsam_deploy.serving.drain import unsent_bytes, wait_until_answered

ANSWER = 64 << 20


@contextmanager
def connected(family: socket.AddressFamily, host: str) -> Iterator[tuple[socket.socket, ...]]:
    """A server's end of a connection and its client's."""
    listening = socket.create_server((host, 0), family=family)
    with listening, socket.create_connection(listening.getsockname()[:2]) as client:
        server, _ = listening.accept()
        with server:
            yield server, client


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
@pytest.mark.parametrize("shut", [False, True], ids=["both ways", "the client sends no more"])
def test_what_a_client_has_not_taken_is_counted(family, host, shut):
    with connected(family, host) as (server, client):
        port = server.getsockname()[1]
        if shut:
            client.shutdown(socket.SHUT_WR)
        assert unsent_bytes({port}) == 0
        server.setblocking(False)
        sent = server.send(bytes(ANSWER))
        assert 0 < sent < ANSWER  # the rest is more than both ends hold
        assert 0 < unsent_bytes({port}) <= sent
        assert unsent_bytes({client.getsockname()[1]}) == unsent_bytes(set()) == 0
        left = sent
        while left:
            left -= len(client.recv(left))
        assert wait_until(lambda: unsent_bytes({port}) == 0)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Time passes only by waiting."""
    now = [0.0]
    monkeypatch.setattr(drain.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(drain.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    return now


def test_an_answer_that_is_between_two_places_for_a_moment_is_waited_for(clock):
    def busy() -> bool:
        return clock[0] < 1 or 1.1 < clock[0] < 2

    assert wait_until_answered(busy, lambda: False, 30)
    assert 2 < clock[0] < 3


def test_the_time_is_bounded(clock):
    assert not wait_until_answered(lambda: True, lambda: False, 5)
    assert 5 < clock[0] < 5.2


def test_nobody_waits_for_a_server_that_has_ended(clock):
    assert wait_until_answered(lambda: True, lambda: clock[0] > 1, 30)
    assert clock[0] < 1.2
