"""Nothing is collected, and no host is looked up, by this package or the libraries below it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from dbsam_deploy.machine import privacy
from dbsam_deploy.machine.child_process import run_python
from dbsam_deploy.serving import server
from dbsam_deploy.serving.environment import ServerEnvironment
from dbsam_deploy.serving.runtime import server_variables
from dbsam_deploy.sessions.onnxruntime_providers import import_onnxruntime

ROOT = Path(__file__).resolve().parents[2]

RECORDER = r"""
#define _GNU_SOURCE
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <errno.h>
#include <sys/socket.h>
static void note(const char *what, const char *who) {
  FILE *log = fopen(getenv("LOOKED_UP"), "a");
  if (log) { fprintf(log, "%s %s\n", what, who ? who : ""); fclose(log); }
}
int getaddrinfo(const char *host, const char *port, const struct addrinfo *hints,
                struct addrinfo **found) {
  note("getaddrinfo", host);
  return EAI_AGAIN;
}
struct hostent *gethostbyname(const char *host) {
  note("gethostbyname", host);
  return NULL;
}
int connect(int socket, const struct sockaddr *to, socklen_t size) {
  note("connect", "");
  errno = ENETUNREACH;
  return -1;
}
"""
"""Preloaded, it hears C libraries as well as Python, and lets nothing out."""

USE = """
import sys
import numpy as np
from onnx import TensorProto, helper, save
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
opset = [helper.make_opsetid("", 17)]
save(helper.make_model(graph, opset_imports=opset, ir_version=8), sys.argv[1])
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
session.run(None, {"x": np.zeros(1, np.float32)})
try:
    onnxruntime.InferenceSession(b"no graph")
except Exception as error:
    assert "rotobuf" in str(error), error
openvino.compile_model(openvino.Core().read_model(sys.argv[1]), "CPU")({"x": np.zeros(1)})
import time
time.sleep(float(sys.argv[2]))
"""
OURS = """
from dbsam_deploy.sessions.onnxruntime_providers import import_onnxruntime
from dbsam_deploy.sessions.openvino_session import import_openvino
onnxruntime, openvino = import_onnxruntime(), import_openvino()
"""
THEIRS = "import onnxruntime, openvino"


@dataclass(frozen=True)
class Traces:
    """What a process left: files in the user's folders, and hosts that it asked for."""

    files: list[str]
    hosts: list[str]


@pytest.fixture(scope="module")
def recorder(tmp_path_factory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("no C compiler on Linux to hear look-ups with")
    folder = tmp_path_factory.mktemp("recorder")
    (folder / "recorder.c").write_text(RECORDER)
    library = folder / "recorder.so"
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "recorder.c")]
    subprocess.run(command, check=True)
    return library


def traces(recorder: Path, folder: Path, start: str, *, wait_s: float = 0) -> Traces:
    """Run `start` and `USE` in a process whose home and scratch folders are new."""
    home, heard = folder / "home", folder / "heard.txt"
    home.mkdir(parents=True)
    heard.touch()
    environment = {
        "HOME": str(home),
        "TMPDIR": str(home),
        "XDG_CACHE_HOME": str(home),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LD_PRELOAD": str(recorder),
        "LOOKED_UP": str(heard),
    }
    program = [sys.executable, "-c", start + USE, str(folder / "graph.onnx"), str(wait_s)]
    subprocess.run(program, check=True, env=environment, cwd=folder, timeout=120)
    files = [path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()]
    return Traces(sorted(files), heard.read_text().splitlines())


@pytest.mark.openvino
def test_nothing_is_collected_and_nobody_looked_up(recorder, tmp_path):
    assert traces(recorder, tmp_path / "ours", OURS) == Traces([], [])


@pytest.mark.openvino
def test_the_recorder_hears_what_these_libraries_do_by_themselves(recorder, tmp_path):
    found = traces(recorder, tmp_path / "theirs", THEIRS, wait_s=0.5)
    assert any(name.endswith("onnxruntime.db") for name in found.files)
    assert any("openvino" in name for name in found.files)
    assert any(line.startswith("getaddrinfo www.google-analytics") for line in found.hosts)


@pytest.mark.slow
@pytest.mark.openvino
def test_nothing_is_sent_later(recorder, tmp_path):
    """ONNX Runtime's uploader starts after nine seconds."""
    start = time.monotonic()
    theirs = traces(recorder, tmp_path / "theirs", THEIRS, wait_s=12)
    assert any("events.data.microsoft.com" in line for line in theirs.hosts)
    assert time.monotonic() - start > 12
    assert traces(recorder, tmp_path / "ours", OURS, wait_s=12) == Traces([], [])


def test_workers_and_servers_inherit_it(monkeypatch, tmp_path):
    for name in privacy.VARIABLES:
        monkeypatch.setenv(name, "0")
    server = server_variables(ServerEnvironment(tmp_path, tmp_path, tmp_path, ()), tmp_path)
    assert privacy.VARIABLES.items() <= server.items()
    privacy.switch_off()
    asked = f"import os; print([os.environ[name] for name in {list(privacy.VARIABLES)}])"
    assert run_python(["-c", asked]).output.strip() == str(list(privacy.VARIABLES.values()))


def test_an_onnxruntime_that_was_imported_before_is_silenced(monkeypatch):
    calls = []
    runtime = ModuleType("onnxruntime")
    runtime.disable_telemetry_events = lambda: calls.append("disabled")
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    assert import_onnxruntime() is runtime
    assert calls == ["disabled"]


def test_a_sender_that_was_imported_before_stays(monkeypatch):
    """Taking it away from code that uses it already would break that code."""
    sender = ModuleType("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", sender)
    privacy.switch_off()
    assert sys.modules["openvino_telemetry"] is sender
    monkeypatch.delitem(sys.modules, "openvino_telemetry")
    privacy.switch_off()
    assert sys.modules["openvino_telemetry"] is None


@pytest.mark.triton
def test_every_process_of_a_running_server_has_it_switched_off(triton):
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if int(stat.read_text().rpartition(")")[2].split()[2]) == triton.pid:
                pairs = (stat.parent / "environ").read_bytes().decode().split("\0")
                found[stat.parent.name] = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    assert len(found) > 3, "the server and its Python models"
    for variables in found.values():
        assert privacy.VARIABLES.items() <= variables.items()


@pytest.mark.slow
@pytest.mark.triton
def test_a_running_server_asks_nobody_and_keeps_nothing(
    tiny_repository, server_environment, tmp_path, monkeypatch
):
    """Traced past the nine seconds after which ONNX Runtime would have sent its queue."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace on the PATH")
    trace, home, start = tmp_path / "trace", tmp_path / "home", server.start_tied
    home.mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(home))
    options = ["-f", "-qq", "-o", str(trace), "-e", "trace=network,openat"]
    monkeypatch.setattr(
        server, "start_tied", lambda command, *more: start([strace, *options, *command], *more)
    )
    log, ports = tmp_path / "log", server.Ports(0, 0, 0)
    with server.TritonServer(tiny_repository.folder, server_environment, log=log, ports=ports):
        time.sleep(12)
        lines = trace.read_text().splitlines()
    assert any("bind(" in line and "sin" in line for line in lines), "it listens, so it is traced"
    sent = [line for line in lines if re.search(r"(connect|sendto|sendmsg)\(.*AF_INET", line)]
    assert sent == []
    assert [line for line in lines if "resolv.conf" in line] == []
    assert [path for path in home.rglob("*") if path.is_file()] == []
