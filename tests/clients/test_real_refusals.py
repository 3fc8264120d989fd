"""Refusals of the real server: draining, a model that is loaded again, forks, the request's id."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.clients.retries import Retries
from dbsam_deploy.core.contract import interactive_spec
from dbsam_deploy.core.errors import BusyError, InputError, StoppingError
from dbsam_deploy.core.front import DRAINING
from dbsam_deploy.serving.runtime import CONTROL

pytestmark = pytest.mark.triton
BOX = np.array([[3, 4, 20, 30]], np.float32)
ONCE = Retries(attempts=1)


@pytest.fixture
def image():
    return np.random.default_rng().integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(params=["grpc", "http"])
def way(request, triton):
    return (triton.grpc_url if request.param == "grpc" else triton.http_url), request.param


@pytest.fixture
def draining(triton):
    """The file that makes the server's models refuse what is new."""
    path = triton._runtime / CONTROL / DRAINING
    path.touch()
    yield path
    path.unlink(missing_ok=True)


def test_a_draining_server_says_that_it_stops(way, image, draining):
    with DbsamClient(*way, retries=ONCE) as client:
        for ask in (lambda: client.segment(image, BOX), lambda: client.open(image)):
            with pytest.raises(StoppingError, match=r"stopping: .*request [0-9a-f]{12}\)$"):
                ask()
    with DbsamClient(*way, retries=Retries(attempts=20, first_s=0.05, longest_s=0.05)) as client:
        threading.Timer(0.2, draining.unlink).start()
        assert client.segment(image, BOX).masks.shape == (1, 1, 40, 50)


def test_a_model_that_is_loaded_again_is_waited_for(triton, way, image):
    model = interactive_spec(1).name
    with (
        DbsamClient(*way, retries=ONCE) as hasty,
        DbsamClient(*way, retries=Retries(attempts=99, first_s=0.05, longest_s=0.1)) as patient,
        ThreadPoolExecutor(1) as thread,
    ):
        opened = patient.open(image)
        expected = opened.predict(boxes=BOX)
        triton.control._call(f"/v2/repository/models/{model}/unload", {})
        try:
            with pytest.raises(BusyError):
                hasty.take(image).predict(boxes=BOX)
            answer = thread.submit(opened.predict, boxes=BOX)
        finally:
            triton.control.reload(model, 60)
        np.testing.assert_array_equal(answer.result().masks, expected.masks)
        assert opened.known.cached is False  # its cache went with it


def test_the_id_of_a_request_is_in_both_logs(triton, image, draining, caplog):
    with (
        DbsamClient(triton.grpc_url, retries=Retries(attempts=2, first_s=0)) as client,
        caplog.at_level("WARNING", "dbsam_deploy.clients"),
        pytest.raises(StoppingError) as caught,
    ):
        client.take(image).predict(boxes=BOX)
    number = str(caught.value).rpartition("(request ")[2].rstrip(")")
    assert f"(request {number}); attempt 2" in caplog.text
    until = time.monotonic() + 5  # the log is written beside the answer
    while f"[request {number}]" not in triton.log_text() and time.monotonic() < until:
        time.sleep(0.02)
    assert f"[request {number}]" in triton.log_text()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_forked_process_is_answered_or_refused_in_one_line(triton, image, protocol):
    url = triton.grpc_url if protocol == "grpc" else triton.http_url
    with DbsamClient(url, protocol, timeout_s=20) as client:
        expected = client.segment(image, BOX).masks
        child = os.fork()
        if child == 0:
            status = 9
            try:
                if protocol == "http":
                    status = int(not np.array_equal(client.segment(image, BOX).masks, expected))
                else:
                    for use in (lambda: client.segment(image, BOX), lambda: DbsamClient(url)):
                        try:
                            use()
                        except InputError as error:
                            status = 0 if "forked" in str(error) else 8
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        np.testing.assert_array_equal(client.segment(image, BOX).masks, expected)
