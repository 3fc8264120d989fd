"""Refusals: which are sent again and when, what the server is told, how errors are told apart."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import pickle
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from support.scripted_server import scripted_server

from dbsam_deploy.clients import exchange
from dbsam_deploy.clients.async_client import AsyncDbsamClient
from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.clients.retries import Retries
from dbsam_deploy.core.errors import (
    BusyError,
    DeadlineError,
    InputError,
    NoServerError,
    NotKeptError,
    ServingError,
    StoppingError,
)

BUSY = ("UNAVAILABLE", "busy: 9 requests wait, at most 8; retry after 60 ms")
STOPPING = ("UNAVAILABLE", "stopping: this server ends; retry another server")
QUICK = Retries(first_s=0.01, longest_s=0.02)
IMAGE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
BOX = np.array([[0, 0, 3, 3]], np.float32)


@pytest.fixture(params=["grpc", "http"])
def protocol(request):
    return request.param


@pytest.fixture
def server(protocol):
    with scripted_server(protocol) as script:
        yield script


def ask(server, protocol, **options):
    with DbsamClient(server.url, protocol, **{"retries": QUICK, **options}) as client:
        return client.segment(IMAGE, BOX)


def ask_async(server, protocol, **options):
    async def run():
        options.setdefault("retries", QUICK)
        async with AsyncDbsamClient(server.url, protocol, **options) as client:
            return await client.segment(IMAGE, BOX)

    return asyncio.run(run())


@pytest.mark.parametrize("way", [ask, ask_async])
def test_a_busy_server_is_asked_again_when_it_says(server, protocol, way, caplog):
    server.refusals += [BUSY, BUSY]
    with caplog.at_level(logging.WARNING, "dbsam_deploy.clients"):
        assert way(server, protocol).masks.shape == (1, 1, 4, 4)
    times = [seen.at for seen in server.seen]
    assert len(times) == 3
    assert all(later - earlier >= 0.06 for earlier, later in itertools.pairwise(times))
    (number,) = {seen.id for seen in server.seen}
    assert re.fullmatch("[0-9a-f]{12}", number)
    assert len(caplog.records) == 2
    assert all(number in record.getMessage() for record in caplog.records)


def test_only_as_often_as_told_and_the_last_refusal_is_the_error(server, protocol):
    server.refusals += [BUSY] * 9
    with pytest.raises(BusyError, match="9 requests wait") as caught:
        ask(server, protocol, retries=Retries(attempts=2, first_s=0, longest_s=0))
    assert len(server.seen) == 2
    assert caught.value.retry_after_s == pytest.approx(0.06)
    assert server.seen[0].id in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
    assert (str(again), again.retry_after_s) == (str(caught.value), 0.06)


@pytest.mark.parametrize("way", [ask, ask_async])
def test_no_attempt_goes_beyond_the_deadline_which_the_server_knows(server, protocol, way):
    server.refusals += [BUSY] * 99
    start = time.monotonic()
    with pytest.raises((BusyError, DeadlineError)):
        way(server, protocol, timeout_s=0.4, retries=Retries(attempts=99, first_s=0.01))
    assert time.monotonic() - start < 0.6
    limits = [seen.timeout_us for seen in server.seen]
    assert 1 < len(limits) < 8
    assert 0.3e6 < limits[0] <= 0.4e6
    assert all(later < earlier for earlier, later in itertools.pairwise(limits))


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (("INVALID_ARGUMENT", "box 0: expected x0 < x1"), InputError),
        (("NOT_FOUND", "image_id abc: not kept (any more): send raw_image"), NotKeptError),
        (("CANCELLED", "too late: the deadline passed 3 ms ago"), DeadlineError),
        (("INTERNAL", "busy: this is no refusal"), ServingError),
        (("UNAVAILABLE", "the answer could not be sent, is /dev/shm full?"), BusyError),
    ],
    ids=str,
)
def test_other_refusals_are_errors_at_once(server, protocol, refusal, kind):
    server.refusals.append(refusal)
    with pytest.raises(kind, match=r"request [0-9a-f]{12}") as caught:
        ask(server, protocol, retries=Retries(attempts=1) if kind is BusyError else QUICK)
    assert type(caught.value) is kind
    assert len(server.seen) == 1
    assert server.seen[0].id in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        STOPPING[1],
        "Server is stopping, scheduler for model has stopped accepting new inference requests",
    ],
)
def test_a_stopping_server_is_not_an_absent_one(server, protocol, text):
    server.refusals += [("UNAVAILABLE", text)] * 9
    with pytest.raises(StoppingError, match="is stopping"):
        ask(server, protocol)
    assert len(server.seen) == QUICK.attempts


def test_a_server_that_said_it_stops_and_went_has_stopped(protocol):
    retries = Retries(first_s=0.4, longest_s=0.4)
    with ExitStack() as running, ThreadPoolExecutor(1) as thread:
        script = running.enter_context(scripted_server(protocol))
        script.refusals.append(STOPPING)
        with DbsamClient(script.url, protocol, retries=retries) as client:
            answer = thread.submit(client.segment, IMAGE, BOX)
            while not script.seen:
                time.sleep(0.005)
            running.close()
            with pytest.raises(StoppingError, match="stopping"):
                answer.result()
    assert len(script.seen) == 1


@pytest.fixture
def closed_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_an_absent_server_is_waited_for_only_if_asked(protocol, closed_port):
    url, pauses = f"127.0.0.1:{closed_port}", []
    for lost, expected in ((False, 0), (True, 3)):
        retries = Retries(attempts=4, first_s=0.01, longest_s=0.01, lost_connection=lost)
        with DbsamClient(url, protocol, retries=retries) as client:
            client._pause = pauses.append
            with pytest.raises(NoServerError, match="no Triton server answers"):
                client.segment(IMAGE, BOX)
        assert len(pauses) == expected


def test_a_server_that_comes_back_is_found_again(protocol):
    with scripted_server(protocol) as script:
        port = int(script.url.split(":")[1])
        retries = Retries(attempts=99, first_s=0.05, longest_s=0.05, lost_connection=True)
        client = DbsamClient(script.url, protocol, retries=retries, timeout_s=20)
        client.segment(IMAGE, BOX)
    with client, ThreadPoolExecutor(1) as thread:
        answer = thread.submit(client.segment, IMAGE, BOX)
        time.sleep(0.3)
        assert not answer.done()
        with scripted_server(protocol, port) as script:
            assert answer.result().masks.shape == (1, 1, 4, 4)
            assert len(script.seen) == 1


@pytest.mark.parametrize("way", [ask, ask_async])
def test_the_wrong_port_is_named(protocol, way):
    other = {"grpc": "http", "http": "grpc"}[protocol]
    names = {"grpc": "its HTTP port", "http": "its gRPC port"}
    with scripted_server(other) as script, pytest.raises(NoServerError, match=names[protocol]):
        way(script, protocol)


def test_pauses_grow_are_bounded_and_differ():
    retries = Retries(attempts=9, first_s=0.1, longest_s=1)
    busy = BusyError("")
    drawn = [[retries.pause_s(sent, busy) for _ in range(50)] for sent in range(1, 9)]
    for sent, pauses in enumerate(drawn):
        longest = min(1, 0.1 * 2**sent)
        assert all(longest / 2 <= pause <= longest for pause in pauses)
        assert len(set(pauses)) > 10
    told = [retries.pause_s(1, BusyError("", 3.0)) for _ in range(50)]
    assert all(3 <= pause <= 4.5 for pause in told)
    assert retries.pause_s(9, busy) is None


@pytest.mark.parametrize(
    "options", [{"attempts": 0}, {"first_s": -1}, {"first_s": 9}, {"longest_s": float("nan")}]
)
def test_unusable_retries_are_refused(options):
    with pytest.raises(InputError, match="retries"):
        Retries(**options)


def test_threads_share_a_client(server, protocol):
    """`tritonclient`'s own HTTP client hangs in any thread but the one that made it."""
    with DbsamClient(server.url, protocol, timeout_s=20) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: client.segment(IMAGE, BOX), range(64)))
    assert len(answers) == len({seen.id for seen in server.seen}) == 64


def _in_child(work) -> int:
    """Exit status of a forked process that runs `work`."""
    child = os.fork()
    if child == 0:
        try:
            status = work()
        except BaseException:
            status = 99
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_process_has_connections_of_its_own_over_http():
    with scripted_server("http") as script, DbsamClient(script.url, "http") as client:
        client.segment(IMAGE, BOX)
        pool = client._client._pool

        def work() -> int:
            client.segment(IMAGE, BOX)
            return 7 if client._client._pool is not pool else 1

        assert _in_child(work) == 7
        client.segment(IMAGE, BOX)
        assert len(script.seen) == 3


def test_grpc_is_refused_in_a_forked_process(monkeypatch):
    """It would fail or hang there: `Wrong file descriptor generation`."""
    client = DbsamClient("127.0.0.1:1")
    parent = os.getpid()
    monkeypatch.setattr(exchange.os, "getpid", lambda: parent + 1)  # as in the child
    for use in (lambda: client.segment(IMAGE, BOX), lambda: DbsamClient("127.0.0.1:1")):
        with pytest.raises(InputError, match=r"forked.*spawn"):
            use()
    monkeypatch.undo()
    client.close()


def test_a_key_is_asked_for_where_shared_memory_needs_it(server, protocol, monkeypatch):
    class Restricted:
        def register_system_shared_memory(self, *args, **options):
            raise client._refused("This API is restricted, expecting header 'dbsam-key'", "403")

    with DbsamClient(server.url, protocol, shared_memory=True) as client:
        register = Restricted().register_system_shared_memory
        monkeypatch.setattr(client._client, "register_system_shared_memory", register)
        with pytest.raises(InputError, match="DBSAM_SERVER_KEY"):
            client.segment(IMAGE, BOX)
