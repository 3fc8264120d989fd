"""What the image starts, on an installation laid out like NVIDIA's: served, watched, drained."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.serving import wait_until

from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.serving.environment import ServerEnvironment, find_environment
from dbsam_deploy.serving.runtime import STANDINS

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deployment" / "Dockerfile").read_text().replace("\\\n", " ")
BOX = np.array([[2, 3, 30, 25]], np.float32)


@pytest.fixture
def installation(server_environment: ServerEnvironment, tmp_path: Path) -> Path:
    """The wheel's server in the places of /opt/tritonserver; the stand-ins as its backends."""
    folder = tmp_path / "tritonserver"
    (folder / "bin").mkdir(parents=True)
    binary = folder / "bin" / "tritonserver"
    libraries = ":".join(map(str, server_environment.library_path))
    python = (server_environment.folder / "bin").absolute()
    binary.write_text(
        f'#!/bin/sh\nexport LD_LIBRARY_PATH={shlex.quote(libraries)} PATH={python}:"$PATH"\n'
        f'exec {shlex.quote(str(server_environment.binary))} "$@"\n'
    )
    binary.chmod(0o755)
    backend = folder / "backends" / "python"
    source = server_environment.root / "backends" / "python"
    backend.mkdir(parents=True)
    for path in (source / "libtriton_python.so", source / "triton_python_backend_utils.py"):
        shutil.copy2(path, backend)
    shutil.copy2(server_environment.stub, backend)
    for standin in STANDINS.iterdir():
        shutil.copytree(standin, folder / "backends" / standin.name)
    return folder


def test_the_images_first_process_serves_and_drains(installation, tiny_repository, tmp_path):
    (words,) = re.findall(r"^ENTRYPOINT (\[.+\])$", DOCKERFILE, re.M)
    arguments = json.loads(words)[3:]
    replaced = {"/opt/tritonserver": installation, "/models": tiny_repository.folder}
    replaced["0.0.0.0"] = "127.0.0.1"  # noqa: S104 - nobody else is to reach it here
    assert set(replaced) <= set(arguments)
    arguments = [str(replaced.get(word, word)) for word in arguments]
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    work = tmp_path / "tmp"
    work.mkdir()
    output = tmp_path / "output"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "dbsam_deploy", *arguments, *ports, "--grace=10"],
            cwd=work,
            env=os.environ | {"TMPDIR": str(work), "PYTHONPATH": str(ROOT)},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        assert wait_until(
            lambda: b"Ctrl-C stops it" in output.read_bytes() or process.poll() is not None, 60
        )
        said = output.read_text()
        assert process.poll() is None, said
        (grpc,) = re.findall(r"^  gRPC +(\S+)$", said, re.M)
        with DbsamClient(grpc) as client:
            image = np.random.default_rng().integers(0, 256, (40, 33, 3), dtype=np.uint8)
            assert client.segment(image, BOX).masks.shape[-2:] == (40, 33)
        key = work / "server.key"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - began < 10
    finally:
        process.kill()
        process.wait()
    said = output.read_text()
    assert "Started HTTPService" in said, "the server's own words, for `docker logs`"
    assert "CPU stand-ins serve" not in said
    assert "24.10" not in said, "the warning is about the wheel"
    assert said.rstrip().endswith("stopped")
    assert list(work.iterdir()) == [], "nothing is left, not even the key"


def test_an_image_without_the_python_backend_is_refused(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tritonserver").touch()
    with pytest.raises(EngineError, match="no Python backend"):
        find_environment(tmp_path)
