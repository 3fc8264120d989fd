"""`python -m dbsam_deploy.serve`: tries an image, stops cleanly, prints the container's command."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbsam_deploy import serve
from dbsam_deploy.cli import run
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.serving.repository import build_repository
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


@pytest.mark.triton
def test_interrupting_the_command_twice_still_stops_the_server(served_copy, server_environment):
    command = serve_command("--repository", str(served_copy.folder))
    command += ["--server-env", str(server_environment.folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Ctrl-C stops it" in line:
                break
        else:
            pytest.fail("".join(lines))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    assert "stopped" in rest
    assert len(children) == 1
    deadline = time.monotonic() + 5  # a stopped process needs a moment to go
    while (left := Path(f"/proc/{children[0]}")).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left.exists()


def test_the_docker_command_names_ports_volume_and_packages(tiny_repository, capsys):
    root = str(tiny_repository.folder)
    assert serve.main(["--docker", "--repository", root, "--http-port", "9000"]) == 0
    text = capsys.readouterr().out
    assert "--gpus all" in text
    assert "--shm-size" in text
    assert "-e ORT_DISABLE_TELEMETRY=1" in text
    assert "-p 127.0.0.1:9000:8000" in text
    assert f"-v {root}:/models:ro" in text
    assert "nvcr.io/nvidia/tritonserver:24.10-py3" in text
    assert "pip install --quiet pillow" in text
    assert subprocess.run(["bash", "-n", "-c", text], check=False).returncode == 0
    assert serve.main(["--docker", "--repository", root, "--host", "0.0.0.0"]) == 0  # noqa: S104
    assert "-p 0.0.0.0:8001:8001" in capsys.readouterr().out


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
    monkeypatch.setattr(serve, "find_environment", lambda *_args, **_options: None)
    monkeypatch.setattr(serve, "TritonServer", stop)
    with pytest.raises(Stopped):
        serve.main(["--repository", str(tiny_repository.folder)])
    text = capsys.readouterr().out
    assert "uses the CPU only" in text
    assert "docker run" in text
    assert "NOTE: test graphs" in text
