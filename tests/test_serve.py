"""`python -m dbsam_deploy.serve`: tries an image, stops cleanly, prints the container's command."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http
from PIL import Image
from support.serving import ask_grpc, inputs_of, processes_of, wait_until

from dbsam_deploy import serve
from dbsam_deploy.cli import run
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.serving.containers import CONTAINERS, FOR_ONNX
from dbsam_deploy.serving.control import requests_in_flight
from dbsam_deploy.serving.drain import unsent_bytes
from dbsam_deploy.serving.environment import ServerEnvironment
from dbsam_deploy.serving.ports import Ports
from dbsam_deploy.serving.probe import probe_image
from dbsam_deploy.serving.processes import SHARED_MEMORY, children, free_left_shared_memory, stubs
from dbsam_deploy.serving.repository import build_repository
from dbsam_deploy.serving.runtime import remove_left_runtimes
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession

ROOT = Path(__file__).resolve().parent.parent


def serve_command(*more: str) -> list[str]:
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    return [sys.executable, "-m", "dbsam_deploy.serve", *ports, *more]


@pytest.fixture
def served_copy(tiny_artefact, tmp_path):
    """A repository of its own, since the log is written beside it."""
    return build_repository(tiny_artefact, tmp_path / "build" / "model_repository")


@pytest.mark.triton
def test_the_command_tries_one_image(served_copy, server_environment, tiny_artefact, tmp_path):
    image = np.random.default_rng().integers(0, 256, (50, 64, 3), dtype=np.uint8)
    predictor = Predictor(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)
    predictor.set_image(image)
    expected = predictor.predict_boxes(np.array([[2, 3, 30, 25]], np.float32)).masks[0, 0]
    Image.fromarray(image).save(tmp_path / "picture.png")
    command = serve_command("--repository", str(served_copy.folder))
    command += ["--server-env", str(server_environment.folder), "--output", str(tmp_path / "out")]
    command += ["--try", str(tmp_path / "picture.png"), "--box", "2", "3", "30", "25"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "stand-ins" in result.stdout
    assert re.search(r"1 slice in [\d.]+ ms", result.stdout)
    mask = np.asarray(Image.open(tmp_path / "out" / "picture_mask.png"))
    np.testing.assert_array_equal(mask, expected)
    assert Image.open(tmp_path / "out" / "picture_overlay.png").size[0] >= 64
    assert "STAND-IN" in (tmp_path / "build" / "triton-server.log").read_text()


@contextmanager
def serving(
    repository, environment, *more: str
) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """`serve` as a process, and what it announced: gRPC, HTTP, log, key and so on."""
    command = serve_command("--repository", str(repository.folder), *more)
    command += ["--server-env", str(environment.folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        lines, told = [], {}
        for line in process.stdout:
            lines.append(line)
            told.update([line.split()[:2]] if line.startswith("  ") else [])
            if "Ctrl-C stops it" in line:
                break
        else:
            pytest.fail("".join(lines))
        yield process, told
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


class SlowReader(threading.Thread):
    """An HTTP client that reads its answer once others have theirs, a moment later."""

    def __init__(self, url: str, image: np.ndarray, times: int) -> None:
        """Return once its answer waits for it."""
        super().__init__()
        self.others: list[threading.Thread] = []
        self.read = 0
        body, start = http.InferenceServerClient.generate_request_body(
            inputs_of(http, image, times), outputs=[http.InferRequestedOutput("masks")]
        )
        headers = {"Inference-Header-Content-Length": str(start)}
        self.connection = HTTPConnection(url)
        self.connection.request("POST", "/v2/models/dbsam/infer", body, headers)
        assert wait_until(lambda: unsent_bytes({self.connection.port}) > 0, 60)

    def run(self) -> None:
        for other in self.others:
            other.join()
        time.sleep(1)
        with closing(self.connection):
            self.read = len(self.connection.getresponse().read())


@pytest.mark.triton
def test_sigterm_lets_accepted_requests_finish_and_refuses_new_ones(
    served_copy, server_environment
):
    image = np.random.default_rng().integers(0, 256, (400, 400, 3), dtype=np.uint8)
    masks = (256, 400, 400)  # quickly sent, and some time in the decoder
    answers, refusals, late = [], [], []

    def ask() -> None:
        with closing(grpc.InferenceServerClient(told["gRPC"])) as client:
            try:
                answers.append(ask_grpc(client, image, 60, times=masks[0]).shape)
            except grpc.InferenceServerException as error:
                answers.append(error.message())

    def ask_late(client: grpc.InferenceServerClient) -> None:
        try:
            ask_grpc(client, probe_image(), 60)
        except grpc.InferenceServerException as error:
            refusals.append((error.status(), error.message()))

    with serving(served_copy, server_environment, "--grace", "120") as (process, told):
        assert Path(told["key"]).stat().st_mode & 0o777 == 0o600
        check = ["--check", told["HTTP"], "--repository", str(served_copy.folder)]
        assert run(serve.main, check) == 0
        metrics = urlsplit(told["metrics"]).netloc
        client = grpc.InferenceServerClient(told["gRPC"])
        ask_grpc(client, probe_image(), 60)  # connected before the server begins to stop
        reader = SlowReader(told["HTTP"], image, masks[0])
        assert wait_until(lambda: requests_in_flight(metrics) == 0)
        reader.others = [threading.Thread(target=ask) for _ in range(8)]
        for thread in (*reader.others, reader):
            thread.start()
        assert wait_until(lambda: requests_in_flight(metrics) >= 4)
        process.send_signal(signal.SIGTERM)
        while process.poll() is None:  # one may still be accepted and wait for those before it
            late.append(threading.Thread(target=ask_late, args=(client,)))
            late[-1].start()
            time.sleep(0.05)
        for thread in (*late, *reader.others, reader):
            thread.join()
        client.close()
        assert process.wait(60) == 0
    assert (given := answers.count(masks)) >= 4
    refused = [one for one in answers if one != masks and "stopping: this server takes" in one]
    assert given + len(refused) == len(answers) == 8, f"all of {answers} are whole, none hangs"
    assert reader.read > np.prod(masks)
    assert {status for status, _ in refusals} == {"StatusCode.UNAVAILABLE"}
    assert any("stopping: this server takes no more" in text for _, text in refusals), refusals
    assert not Path(told["key"]).exists()


@pytest.mark.triton
def test_nothing_outlives_a_command_that_is_killed(served_copy, server_environment):
    log = served_copy.folder.parent / "triton-server.log"
    log.write_text("an earlier server\n")
    with serving(served_copy, server_environment) as (process, told):
        assert told["log"] == str(log)
        (server,) = children(process.pid)
        words = Path(f"/proc/{server}/cmdline").read_text()
        prefix = re.search(r"shm-region-prefix-name=(\w+)", words)
        runtime = Path(re.search(r"--model-repository=([^\0]+)", words)[1]).parent
        assert prefix[1] not in free_left_shared_memory(), "it lives"
        assert runtime not in remove_left_runtimes(), "it lives"
        os.kill(stubs(server)[0].pid, signal.SIGSTOP)  # it cannot end by itself
        process.kill()
        process.wait()
        assert wait_until(lambda: not processes_of(server))
    free_left_shared_memory()  # here, or where another test's server begins meanwhile
    assert not list(SHARED_MEMORY.glob(f"{prefix[1]}*"))
    remove_left_runtimes()
    assert not runtime.exists()
    assert log.read_text().startswith("an earlier server\n")
    assert "Started GRPCInferenceService" in log.read_text()


_SIGNALLED = """
import signal, sys, time
from pathlib import Path
from dbsam_deploy import serve
from dbsam_deploy.serving.environment import ServerEnvironment

class Server:
    log, key, grace_s = Path(sys.argv[1], "triton-server.log"), "k" * 32, 60
    compiled = None
    grpc_url = http_url = metrics_url = ""
    environment = ServerEnvironment(log.parent, log.parent, log.parent, ())

    def __enter__(self):
        return self

    def drain(self):
        print("drain", flush=True)
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)

    def __exit__(self, *exception):
        signal.raise_signal(signal.SIGINT)
        print("ended", flush=True)

before = signal.getsignal(signal.SIGINT)  # ignored in a background job
serve.Supervisor.run = lambda self: signal.raise_signal(signal.SIGINT)
status = serve._serve(Server())
assert signal.getsignal(signal.SIGINT) is before
sys.exit(status)
"""


def test_a_second_signal_ends_the_waiting_but_never_the_stopping(tmp_path):
    # In a process of its own: a signal that is not caught would end the tests.
    command = [sys.executable, "-c", _SIGNALLED, str(tmp_path)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=50
    )
    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout.splitlines()
    assert [line for line in said if line in ("drain", "ended", "stopped")] == [
        "drain",
        "ended",
        "stopped",
    ]


def test_the_docker_command_names_image_ports_and_volume(tiny_repository, capsys):
    root = str(tiny_repository.folder)
    assert serve.main(["--docker", "--repository", root, "--http-port", "9000"]) == 0
    text = capsys.readouterr().out
    assert f"--build-arg TRITON_RELEASE={FOR_ONNX.release}" in text
    assert text.count(f"dbsam-triton:{FOR_ONNX.release}") == 2
    assert "--gpus all" in text
    assert "--shm-size" in text
    assert "-p 127.0.0.1:9000:8000" in text
    assert f"-v {root}:/models:ro" in text
    assert "pip install" not in text, "nothing is installed at the start"
    assert subprocess.run(["bash", "-n", "-c", text], check=False).returncode == 0
    assert serve.main(["--docker", "--repository", root, "--host", "0.0.0.0"]) == 0  # noqa: S104
    assert "-p 0.0.0.0:8001:8001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"tensorrt": "10.16.0.72", "cuda": "13.2", "version_compatible": False}, "26.03"),
        ({"tensorrt": "11.1.0.106", "cuda": "", "version_compatible": False}, "26.07"),
        ({"tensorrt": "11.0.0.114", "cuda": "13.3", "version_compatible": True}, "26.08"),
        ({"tensorrt": "10.5.0.18", "cuda": "12.6", "version_compatible": False}, None),
        ({}, None),
    ],
)
def test_the_plans_choose_the_image(tiny_repository, engine, words):
    plans = dict.fromkeys(tiny_repository.platforms, "tensorrt")
    repository = dataclasses.replace(tiny_repository, engine=engine, platforms=plans)
    if words is None:
        with pytest.raises(InputError, match=r"no Triton container is known|does not say which"):
            serve.docker_command(repository, Ports())
        return
    text = serve.docker_command(repository, Ports())
    assert f"TRITON_RELEASE={words}" in text
    (container,) = [one for one in CONTAINERS if one.release == words]
    assert f"TENSORRT={container.tensorrt}" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repository", "nowhere"], "python -m dbsam_deploy.export"),
        (["--server-env", "nowhere"], "python -m dbsam_deploy.serve --install"),
        (["--box", "1", "2", "3", "4"], "go with --try"),
        (["--try", "nowhere.png"], "no such file"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(
    tiny_repository, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    if "--repository" not in options:
        options = [*options, "--repository", str(tiny_repository.folder)]
    assert run(serve.main, options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_gpu_machine_is_told_the_docker_command(tiny_repository, monkeypatch, capsys):
    class Stopped(Exception):  # noqa: N818 - ends the command before a server starts
        pass

    def stop(*_args, **_options):
        raise Stopped

    monkeypatch.setattr(serve, "has_gpu_driver", lambda: True)
    wheel = ServerEnvironment(Path("e"), Path("r"), Path("s"), ())
    monkeypatch.setattr(serve, "find_environment", lambda *_args, **_options: wheel)
    monkeypatch.setattr(serve, "TritonServer", stop)
    with pytest.raises(Stopped):
        serve.main(["--repository", str(tiny_repository.folder)])
    text = capsys.readouterr().out
    assert "uses the CPU only" in text
    assert "docker run" in text
    assert "NOTE: test graphs" in text
