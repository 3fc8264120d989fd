"""The real tritonserver under a supervisor: what is dead or stuck serves again."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc
from support.serving import RESTARTED_WITHIN_S, traffic, wait_until

from dbsam_deploy import serve
from dbsam_deploy.cli import run
from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.clients.retries import Retries
from dbsam_deploy.core.errors import InputError, NoServerError, ServingError
from dbsam_deploy.serving.control import KEY_HEADER, Control, new_key, requests_in_flight
from dbsam_deploy.serving.probe import PROBE_SIZE, SERVED, ask, probe_image
from dbsam_deploy.serving.repository import build_repository
from dbsam_deploy.serving.supervisor import Pace, Supervisor

GRPC_KEY = f"triton-grpc-protocol-{KEY_HEADER}"
BACK_WITHIN_S = 10.0


def http_status(url: str, path: str, body: object, key: str | None) -> int:
    headers = {"Content-Type": "application/json"} | ({KEY_HEADER: key} if key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{url}{path}", data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.triton
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/systemsharedmemory/status", None),
        ("/v2/repository/index", {}),
        ("/v2/repository/models/nothing/unload", {}),
        ("/v2/logging", None),
        ("/v2/trace/setting", None),
        ("/v2/models/stats", None),
        ("/v2/models/dbsam/stats", None),
    ],
)
def test_a_side_door_of_http_opens_with_the_key_only(watched, path, body):
    url = watched.server.http_url
    assert http_status(url, path, body, None) == 403
    assert http_status(url, path, body, "another key of some length") == 403
    assert http_status(url, path, body, watched.server.key) in (200, 400)


@pytest.mark.triton
@pytest.mark.parametrize(
    "call",
    [
        "get_system_shared_memory_status",
        "get_model_repository_index",
        "get_log_settings",
        "get_trace_settings",
        "get_inference_statistics",
    ],
)
def test_a_side_door_of_grpc_opens_with_the_key_only(watched, call):
    client = grpc.InferenceServerClient(watched.server.grpc_url)
    try:
        with pytest.raises(grpc.InferenceServerException, match=r"restricted|expecting header"):
            getattr(client, call)()
        assert getattr(client, call)(headers={GRPC_KEY: watched.server.key}) is not None
    finally:
        client.close()


@pytest.mark.triton
def test_inference_metadata_and_health_need_no_key(watched):
    url = watched.server.http_url
    for path in ("/v2/health/live", "/v2/health/ready", "/v2", "/v2/models/dbsam"):
        assert http_status(url, path, None, None) == 200
    for model in SERVED:
        ask(url, model, timeout_s=20)


@pytest.mark.triton
def test_a_single_stage_is_reached_by_nobody(watched):
    """By its own name, nor by one that anything open to clients would tell."""
    server = watched.server
    client = grpc.InferenceServerClient(server.grpc_url)
    told = [str(client.get_server_metadata())]
    for stage in ("dbsam_encoder", "dbsam_decoder", "dbsam_prompt_decoder"):
        assert http_status(server.http_url, f"/v2/models/{stage}", None, None) == 404
        assert http_status(server.http_url, f"/v2/models/{stage}/infer", {}, None) == 404
        with pytest.raises(grpc.InferenceServerException, match=r"is not found"):
            client.get_model_metadata(stage)
        assert stage + server.ending in server.control.models(), "it is there"
    for model in SERVED:
        told += [str(client.get_model_metadata(model)), str(client.get_model_config(model))]
        for end in ("", "/config", "/ready"):
            url = f"http://{server.http_url}/v2/models/{model}{end}"
            with urllib.request.urlopen(url, timeout=10) as answer:
                told.append(answer.read().decode())
    client.close()
    os.kill(watched.pid_of("dbsam_decoder"), signal.SIGKILL)
    with pytest.raises(ServingError, match=r"dbsam_decoder is being restarted") as error:
        ask(server.http_url, "dbsam", timeout_s=20)
    told.append(str(error.value))
    before = watched.mended
    watched.until(lambda: watched.mended > before)
    assert not [text for text in told if server.ending in text]


@pytest.mark.triton
def test_the_key_is_not_on_the_command_line(watched):
    words = Path(f"/proc/{watched.server.pid}/cmdline").read_text()
    assert f"{KEY_HEADER}=***" in words
    assert watched.server.key not in words
    assert watched.server.key not in Path(f"/proc/{watched.server.pid}/environ").read_text()


@pytest.mark.triton
@pytest.mark.parametrize(
    ("model", "number", "reason"),
    [
        ("dbsam_interactive", signal.SIGKILL, "its process has ended"),
        ("dbsam_encoder", signal.SIGSTOP, "is stopped"),
    ],
)
def test_a_dead_or_stopped_model_is_revived_under_load(watched, model, number, reason):
    before = watched.mended
    patient = Retries(attempts=20, longest_s=0.5, lost_connection=True)
    with (
        traffic(watched.server.grpc_url, fresh=True) as seen,
        DbsamClient(watched.server.grpc_url, retries=patient) as client,
        ThreadPoolExecutor(1) as user,
    ):
        time.sleep(0.2)
        os.kill(watched.pid_of(model), number)
        answer = user.submit(client.segment, probe_image(), np.array([[2, 3, 30, 25]], np.float32))
        watched.until(lambda: watched.mended > before, RESTARTED_WITHIN_S)
        healthy = len(seen.right)
        watched.until(lambda: len(seen.right) > healthy + 8, RESTARTED_WITHIN_S)
        assert answer.result(20).masks.shape == (1, 1, *PROBE_SIZE), "its user sees nothing of it"
    assert not seen.wrong
    assert any(model in event and reason in event for event in watched.events)
    log = watched.server.log.read_text()
    assert f"dbsam: {model}: revived after" in log or "the server answers again" in log


@pytest.mark.triton
def test_who_waits_for_a_front_that_was_killed_is_told_soon(watched):
    """Triton itself would let them wait until their own time is over."""
    server, restarted = watched.server, watched.supervisor.restarted
    image = np.random.default_rng().integers(0, 256, (400, 400, 3), np.uint8)
    boxes = np.repeat(np.array([[2, 3, 300, 250]], np.float32), 256, 0)
    told: list[tuple[float, Exception | None]] = []

    def ask_for_long() -> None:
        with DbsamClient(server.grpc_url, timeout_s=60) as client:
            try:
                client.segment(image, boxes)
                told.append((time.monotonic(), None))
            except ServingError as error:
                told.append((time.monotonic(), error))

    with ThreadPoolExecutor(4) as users:
        for _ in range(4):
            users.submit(ask_for_long)
        assert wait_until(lambda: requests_in_flight(server.metrics_url) >= 2)
        os.kill(watched.pid_of("dbsam_interactive"), signal.SIGKILL)
        killed = time.monotonic()
        watched.until(lambda: watched.supervisor.restarted > restarted, RESTARTED_WITHIN_S)
    failed = [(at - killed, error) for at, error in told if error is not None]
    assert len(told) == 4
    assert failed
    print(f"told after {[round(seconds, 1) for seconds, _ in failed]} s: {failed[0][1]}")
    for seconds, error in failed:
        assert isinstance(error, NoServerError), "which Retries(lost_connection=True) sends again"
        assert "broke off" in str(error)
        assert seconds < BACK_WITHIN_S
    assert any("and owes" in event for event in watched.events)


@pytest.mark.triton
def test_a_server_that_was_killed_is_started_again_with_ports_and_key(watched):
    server, supervisor = watched.server, watched.supervisor
    before, group, restarted = (server.ports, server.key), server.pid, supervisor.restarted
    with traffic(server.grpc_url, fresh=True) as seen:
        time.sleep(0.2)
        os.kill(group, signal.SIGKILL)
        watched.until(lambda: supervisor.restarted > restarted, RESTARTED_WITHIN_S)
        watched.until(lambda: len(seen.right) > 0 and seen.right[-1][0] > time.monotonic() - 0.5)
    assert (server.ports, server.key) == before
    assert server.pid != group
    assert not seen.wrong
    assert any("ended by SIGKILL" in event for event in watched.events)
    assert Control(server.http_url, server.key).models()["dbsam"] == "READY"


@pytest.mark.triton
def test_the_check_finds_a_dead_model_although_the_ready_flag_stays_up(watched, capsys):
    url = watched.server.http_url
    os.kill(watched.pid_of("dbsam_interactive"), signal.SIGKILL)
    assert http_status(url, "/v2/health/ready", None, None) == 200
    assert run(serve.main, ["--check", url, "--timeout", "20"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is not healthy" in error or "did not answer" in error
    before = watched.mended
    watched.until(lambda: watched.mended > before)
    assert run(serve.main, ["--check", url]) == 0


@pytest.mark.triton
@pytest.mark.parametrize("scheme", ["", "http://", "triton://"])
def test_the_check_wants_the_answers_that_the_repository_knows(
    watched, tiny_repository, make_artefact, tmp_path, capsys, scheme
):
    server = watched.server
    url = scheme + (server.grpc_url if scheme == "triton://" else server.http_url)
    assert run(serve.main, ["--check", url, "--repository", str(tiny_repository.folder)]) == 0
    told = capsys.readouterr().out
    assert all(model in told for model in SERVED)
    assert "as its repository says" in told
    other = build_repository(make_artefact(tmp_path / "a", 64, seed=1), tmp_path / "r").folder
    assert run(serve.main, ["--check", url, "--repository", str(other)]) == 1
    assert "but not what its repository says" in capsys.readouterr().err


def test_the_check_says_in_one_line_that_nothing_is_there(capsys):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{bound.getsockname()[1]}"
        assert run(serve.main, ["--check", url]) == 1
        assert run(serve.main, ["--check", f"triton://{url}", "--timeout", "2"]) == 1
    assert run(serve.main, ["--check", "https://host:8000"]) == 2
    assert run(serve.main, ["--check", "localhost"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 4
    assert "did not answer" in error
    assert "expected host:port" in error


def test_a_server_that_cannot_be_kept_alive_is_given_up_with_its_reason(tmp_path):
    class Broken:
        log = tmp_path / "log"
        has_ended = True
        pid = 0
        told: list[str] = []  # noqa: RUF012

        def why_ended(self) -> str:
            return "it ended"

        def event(self, text: str) -> None:
            self.told.append(text)

        def restart(self) -> None:
            raise ServingError("no memory")

    pauses: list[float] = []
    supervisor = Supervisor(Broken(), pace=Pace(tries=4), sleep=pauses.append)
    with pytest.raises(ServingError, match=r"gave up after 4 restarts: no memory"):
        supervisor.look()
    assert pauses == [0.0, 1.0, 2.0, 4.0]
    assert Broken.told[0] == "it ended; starting the server anew"


def test_a_front_that_dies_again_and_again_owing_answers_is_no_broken_server(monkeypatch):
    class Well:
        has_ended = False
        pid = os.getpid()
        metrics_url = ""
        restarts = 0

        def event(self, text: str) -> None:
            pass

        def restart(self) -> None:
            self.restarts += 1

    pauses: list[float] = []
    monkeypatch.setattr("dbsam_deploy.serving.supervisor.requests_in_flight", lambda url: 2)
    server = Well()
    supervisor = Supervisor(server, sleep=pauses.append)
    for _ in range(8):
        supervisor._expected = {"dbsam_interactive": 1}  # no such process is there
        supervisor.look()
    assert server.restarts == 8
    assert set(pauses) == {0.0}


@pytest.mark.parametrize("model", ["dbsam_encoder", "dbsam_interactive"])
def test_a_server_that_dies_while_a_model_is_loaded_anew_is_named_as_what_ended(model):
    class Dying:
        has_ended = False
        pid = os.getpid()  # which has no such process of a model
        metrics_url = ""

        @property
        def control(self) -> Control:
            self.has_ended = True
            raise ServingError("it did not answer")

        def why_ended(self) -> str:
            return "tritonserver ended by SIGKILL"

        def event(self, text: str) -> None:
            pass

        def restart(self) -> None:
            self.has_ended = False

    events: list[str] = []
    supervisor = Supervisor(Dying(), events.append)
    supervisor._expected = {model: 1}
    supervisor.look()
    assert events[:2] == [
        f"{model}: its process has ended; loading it anew",
        "tritonserver ended by SIGKILL; starting the server anew",
    ]


def test_one_call_that_triton_leaves_unanswered_is_no_reason_to_restart():
    class Busy:
        has_ended = False
        pid = os.getpid()
        restarts = 0
        unanswered = 1

        @property
        def control(self) -> Busy:
            if self.unanswered:
                self.unanswered -= 1
                raise ServingError("it did not answer")
            return self

        def models(self) -> dict[str, str]:
            return {}

        def answered(self) -> dict[str, int]:
            return {}

        def event(self, text: str) -> None:
            pass

        def restart(self) -> None:
            self.restarts += 1

    server = Busy()
    supervisor = Supervisor(server, pace=Pace(probe_least=0.0), sleep=lambda seconds: None)
    for unanswered, restarts in ((1, 0), (1, 0), (2, 1)):
        server.unanswered = unanswered
        for _ in range(3):
            supervisor.look()
        assert server.restarts == restarts


def test_a_key_is_long_random_and_fit_for_a_header():
    assert new_key() != new_key()
    assert len(new_key()) >= 32
    assert new_key("sixteen-letters.") == "sixteen-letters."
    for bad in ("", "short", "sixteen letters,", "ü" * 20):
        with pytest.raises(InputError, match="DBSAM_SERVER_KEY"):
            new_key(bad)
