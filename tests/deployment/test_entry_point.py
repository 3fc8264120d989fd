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
from support.manifests import reseal
from support.serving import wait_until

from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.core.errors import EngineError, ServingError
from dbsam_deploy.files.atomic import sha256_of
from dbsam_deploy.serving.environment import ServerEnvironment, find_environment
from dbsam_deploy.serving.ports import Ports
from dbsam_deploy.serving.repository import REPOSITORY_NAME
from dbsam_deploy.serving.runtime import lay_out
from dbsam_deploy.serving.server import TritonServer

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
    (folder / "backends").mkdir()
    lay_out(server_environment, folder / "backends")
    return folder


def test_the_images_first_process_serves_and_drains(installation, tiny_repository, tmp_path):
    (words,) = re.findall(r"^ENTRYPOINT (\[.+\])$", DOCKERFILE, re.M)
    arguments = json.loads(words)[3:]
    replaced = {"/opt/tritonserver": installation, "/models": tiny_repository.folder}
    replaced["0.0.0.0"] = "127.0.0.1"  # noqa: S104 - nobody else is to reach it here
    assert set(replaced) <= set(arguments)
    arguments = [str(replaced.get(word, word)) for word in arguments]
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    work, started_in = tmp_path / "tmp", tmp_path / "cwd"
    work.mkdir()
    started_in.mkdir()
    output = tmp_path / "output"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "dbsam_deploy", *arguments, *ports, "--grace=10"],
            cwd=started_in,
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
        key = Path(re.findall(r"^  key +(\S+) ", said, re.M)[0])
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert key.is_relative_to(work), "in the server's own folder"
        assert key.parent.stat().st_mode & 0o77 == 0
        assert list(started_in.iterdir()) == []
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


def test_an_installation_gets_its_own_backends_and_the_plugins(tiny_repository, tmp_path):
    root, installed = tmp_path / "models", tmp_path / "tritonserver"
    shutil.copytree(tiny_repository.folder, root)
    plugins = "dbsam_encoder/1/libplugins.so"
    (root / plugins).write_bytes(b"compiled")
    files = {**tiny_repository.files, plugins: sha256_of(root / plugins)}
    reseal(root / REPOSITORY_NAME, files=files, plugins=plugins)
    stub = installed / "backends" / "python" / "triton_python_backend_stub"
    stub.parent.mkdir(parents=True)
    stub.touch()
    binary = installed / "bin" / "tritonserver"
    binary.parent.mkdir()
    # It tells what it was told, and whether the library is where it was told.
    binary.write_text(
        '#!/bin/sh\nfor word; do echo "said $word"; case $word in *plugins=*) '
        'cat "${word##*plugins=}"; esac; done\nenv; exit 3\n'
    )
    binary.chmod(0o755)
    server = TritonServer(
        root, find_environment(installed), log=tmp_path / "log", ports=Ports(0, 0, 0)
    )
    with pytest.raises(ServingError, match="with status 3"):
        server.start()
    said = (tmp_path / "log").read_text()
    assert f"said --backend-directory={installed}/backends\n" in said
    assert "said --allow-gpu-metrics=true\n" in said
    assert f"PATH={Path(sys.executable).parent}:" in said, "whose packages the models get"
    stage, rest = plugins.split("/", 1)
    library = rf"{stage}{server.ending}/{rest}"
    assert re.search(rf"said --backend-config=tensorrt,plugins=/.+/{library}\ncompiled", said)


def test_an_image_without_the_python_backend_is_refused(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tritonserver").touch()
    with pytest.raises(EngineError, match="no Python backend"):
        find_environment(tmp_path)
