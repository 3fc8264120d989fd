"""What happens to a real server: hanging and slow models, spoiled files, odd clients, no memory."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from support.serving import RESTARTED_WITHIN_S, traffic

from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.clients.retries import Retries
from dbsam_deploy.core.bls import public_name
from dbsam_deploy.core.errors import ServingError
from dbsam_deploy.serving.ports import Ports
from dbsam_deploy.serving.probe import PROBE_SIZE, ask, probe_image
from dbsam_deploy.serving.server import TritonServer
from dbsam_deploy.serving.server_log import free_log
from dbsam_deploy.serving.supervisor import FRONT, Pace

HALF_A_REQUEST = (
    b"POST /v2/models/dbsam/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{"
)
ABORTED = re.compile("SIGABRT|Remote end closed|Connection refused|reset by peer")
"""What becomes of a server that aborts when a stub is killed, see `Watched.mended`."""
HALF_A_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM"


@pytest.mark.triton
def test_a_model_that_hangs_is_revived(watched):
    supervisor, before = watched.supervisor, watched.mended
    supervisor.pace = Pace(patience=1.0, probe_least=0.5)
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        watched.hang.unlink(missing_ok=True)  # it does so once

    supervisor.say = tell
    try:
        with traffic(watched.server.grpc_url, fresh=True) as answers:
            time.sleep(0.2)
            with watched.disturbed(watched.hang, "encoder"):
                watched.until(lambda: watched.mended > before, RESTARTED_WITHIN_S)
            right = len(answers.right)
            watched.until(lambda: len(answers.right) > right + 4, RESTARTED_WITHIN_S)
    finally:
        supervisor.pace, supervisor.say = Pace(), watched.events.append
    assert any("dbsam_encoder: it answers nothing" in event for event in told), told
    anew = [event for event in told if "starting the server anew" in event]
    assert not [event for event in anew if not ABORTED.search(event)], told
    assert not answers.wrong


@pytest.mark.triton
def test_a_slow_model_is_left_alone(watched):
    supervisor = watched.supervisor
    before = (supervisor.revived, supervisor.restarted)
    supervisor.pace = Pace(patience=0.5, probe_least=0.2)
    try:
        with (
            traffic(watched.server.grpc_url, fresh=True) as answers,
            watched.disturbed(watched.slow, "coder"),  # all of them
        ):
            end = time.monotonic() + 3
            while time.monotonic() < end:
                supervisor.look()
                time.sleep(0.1)
    finally:
        supervisor.pace = Pace()
    assert (supervisor.revived, supervisor.restarted) == before
    assert len(answers.right) > 3
    assert not answers.wrong
    assert not answers.failed


@contextmanager
def opening(url: str, clients: int) -> Iterator[None]:
    """Images are opened all the time, and nothing is asked of them: the decoder has no work."""
    ended = threading.Event()

    def work() -> None:
        rng = np.random.default_rng()
        with DbsamClient(url, retries=Retries(lost_connection=True)) as client:
            while not ended.is_set():
                with suppress(ServingError):
                    client.open(rng.integers(0, 256, (40, 33, 3), dtype=np.uint8))

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@pytest.mark.triton
def test_a_decoder_that_hangs_is_found_although_images_are_encoded(watched):
    url, supervisor, before = watched.server.grpc_url, watched.supervisor, watched.mended
    supervisor.pace = Pace(patience=1.0, probe_least=0.2, probe_share=1.0, slow=60.0)
    patient = Retries(attempts=20, longest_s=0.5, lost_connection=True)
    box, told = np.array([[2, 3, 30, 25]], np.float32), list[str]()

    def tell(text: str) -> None:
        told.append(text)
        watched.hang.unlink(missing_ok=True)

    supervisor.say = tell
    try:
        with (
            DbsamClient(url, retries=patient) as client,
            ThreadPoolExecutor(1) as user,
            opening(url, 2),
            watched.disturbed(watched.hang, "dbsam_decoder"),
        ):
            click = user.submit(client.segment, probe_image(), box)
            watched.until(lambda: watched.mended > before, RESTARTED_WITHIN_S)
            assert click.result(20).masks.shape == (1, 1, *PROBE_SIZE), "its user sees nothing"
    finally:
        supervisor.pace, supervisor.say = Pace(), watched.events.append
    assert any("dbsam_decoder: it answers nothing" in event for event in told), told


@pytest.mark.triton
def test_a_graph_that_no_longer_answers_is_blamed_before_the_front_that_waits_for_it(watched):
    supervisor = watched.supervisor
    supervisor.pace = Pace(patience=0.5)
    try:
        assert supervisor._mute() == FRONT
        for model in ("dbsam_decoder", "dbsam_prompt_decoder"):
            with watched.disturbed(watched.hang, model):
                assert public_name(supervisor._mute()) == model
    finally:
        supervisor.pace = Pace()


@pytest.mark.triton
def test_a_decoder_that_has_nothing_to_do_is_no_fault(watched):
    """The supervisor's own request waits behind images that are only encoded."""
    supervisor, waited = watched.supervisor, 0.0
    patience = 0.6  # twice what a slow encoder takes for one image
    before = (supervisor.revived, supervisor.restarted)
    supervisor.pace = Pace(patience=patience, probe_least=0.1, probe_share=1.0, slow=3.0)
    try:
        with (
            opening(watched.server.grpc_url, 16),
            watched.disturbed(watched.slow, "encoder"),  # ends first, so that clients end soon
        ):
            end = time.monotonic() + 20
            while waited < 4 * patience and time.monotonic() < end:
                supervisor.look()
                waited = supervisor._asked.age_s if supervisor._asked else 0.0
                time.sleep(0.05)
    finally:
        supervisor.pace = Pace()
    assert waited > 3 * patience, "long enough to look like a fault"
    assert (supervisor.revived, supervisor.restarted) == before


@pytest.mark.triton
def test_files_replaced_or_added_under_a_server_reach_no_model(watched):
    repository, before = watched.server.repository, watched.mended
    spoiled = repository / "dbsam_encoder" / "1" / "model.onnx"
    good = spoiled.read_bytes()
    spoiled.write_bytes(b"no graph")
    shutil.copytree(repository / "dbsam_decoder", repository / "another")
    try:
        with traffic(watched.server.grpc_url) as answers:
            os.kill(watched.pid_of("dbsam_encoder"), signal.SIGKILL)
            watched.until(lambda: watched.mended > before, RESTARTED_WITHIN_S)
            right = len(answers.right)
            watched.until(lambda: len(answers.right) > right + 4, RESTARTED_WITHIN_S)
        assert not answers.wrong
        assert "another" not in watched.server.control.models()
    finally:
        spoiled.write_bytes(good)
        shutil.rmtree(repository / "another")


@pytest.mark.triton
def test_half_open_and_slow_clients_keep_nobody_waiting(watched):
    ports = watched.server.ports
    with ExitStack() as stack:
        for port, words in ((ports.http, HALF_A_REQUEST), (ports.grpc, HALF_A_PREFACE)):
            for _ in range(100):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                connection.sendall(words)
        with traffic(watched.server.grpc_url, clients=2) as answers:
            end = time.monotonic() + 1
            while time.monotonic() < end:
                ask(watched.server.http_url, "dbsam", timeout_s=5)
    assert len(answers.right) > 4
    assert not answers.wrong
    assert not answers.failed


@pytest.mark.triton
def test_sixty_four_clients_get_right_answers_or_are_told_to_retry(watched):
    before = (watched.supervisor.revived, watched.supervisor.restarted)
    with traffic(watched.server.grpc_url, clients=64, timeout_s=30) as answers:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            watched.supervisor.look()
            time.sleep(0.2)
    assert len(answers.right) > 64
    assert not answers.wrong
    assert {text for _, _, text in answers.failed if "UNAVAILABLE" not in text} == set()
    assert (watched.supervisor.revived, watched.supervisor.restarted) == before


@pytest.mark.triton
@pytest.mark.slow
def test_two_servers_share_a_repository(watched, server_environment):
    first = watched.server
    log = free_log(first.repository.parent, "log")
    assert log == first.log.with_name("log-2.log") or log.name == "log.log"
    second = TritonServer(first.repository, server_environment, log=log, ports=Ports(0, 0, 0))
    with second:
        for server in (first, second):
            server.check()
    first.check()


@pytest.mark.triton
@pytest.mark.slow
def test_little_shared_memory_refuses_what_needs_more(
    tiny_repository, server_environment, tmp_path
):
    """In a mount namespace of its own, whose /dev/shm has 6 MiB."""
    script = tmp_path / "script.py"
    script.write_text(
        _LITTLE.format(
            repository=str(tiny_repository.folder),
            environment=str(server_environment.folder),
            log=str(tmp_path / "log"),
        )
    )
    inside = f"mount -t tmpfs -o size=6m none /dev/shm && exec {sys.executable} {script}"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a mount namespace")
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        ["unshare", "-m", "sh", "-c", inside],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert ended.stdout.splitlines() == ["small", "refused", "small"], ended.stderr
    assert "MiB are free in /dev/shm" in (tmp_path / "log").read_text()


_LITTLE = """
import numpy as np
from pathlib import Path
from dbsam_deploy.core.errors import ServingError
from dbsam_deploy.serving.environment import find_environment
from dbsam_deploy.serving.ports import Ports
from dbsam_deploy.serving.probe import ask
from dbsam_deploy.serving.server import TritonServer

environment = find_environment(Path({environment!r}))
large = np.random.default_rng(0).integers(0, 255, (2500, 2500, 3), np.uint8)
free = Ports(0, 0, 0)
with TritonServer(Path({repository!r}), environment, log=Path({log!r}), ports=free) as server:
    ask(server.http_url, "dbsam")
    print("small")
    try:
        ask(server.http_url, "dbsam", image=large)
    except ServingError as error:
        assert "shared memory" in str(error), error
        print("refused")
    ask(server.http_url, "dbsam")
    print("small")
"""
