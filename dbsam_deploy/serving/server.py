"""The real `tritonserver` as a child process: start, prove it answers, read its log, stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..core import array_guard
from ..core.contract import IOU_SCORES, MASKS, RAW_BOXES, RAW_IMAGE, TRITON_TYPES, ensemble_spec
from ..core.errors import InputError, ServingError
from ..privacy import VARIABLES
from .environment import ServerEnvironment
from .snapshot import take_snapshot
from .triton_config import BYTECODE

LOOPBACK = "127.0.0.1"
STANDINS = Path(__file__).parent / "standin_backends"
GUARD = Path(array_guard.__file__)
"""Module that the stand-ins import, as the front model does."""

_STOP_S = 30.0
_KILLED_S = 5.0
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
_PROBE_SIDE = 8
_MODELS = "models"
"""Name of the repository's copy, beside the backends."""


@dataclass(frozen=True)
class Ports:
    """The server's three ports; 0 takes a free one."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


class TritonServer:
    """A `tritonserver` process on one model repository; a context manager.

    The onnxruntime and tensorrt backends are this library's CPU stand-ins, and say so in the log.
    The server gets a private copy of the repository, which was checked when it was made and is
    removed when the server stops: nothing that happens to the repository reaches it.

    Args:
        repository: folder filled by `repository.build_repository`.
        environment: checked server environment.
        log: file for the server's output, replaced.
        ports: ports to listen on.
        host: address to listen on; anything but the loopback opens the server to the network.
        auto_complete: let Triton complete configurations; ours are complete, so this costs seconds
            and is for tests.
        start_timeout_s: how long loading the models may take.
    """

    def __init__(
        self,
        repository: Path,
        environment: ServerEnvironment,
        *,
        log: Path,
        ports: Ports | None = None,
        host: str = LOOPBACK,
        auto_complete: bool = False,
        start_timeout_s: float = 300.0,
    ) -> None:
        self.repository = repository
        self.environment = environment
        self.log = log
        self.host = host
        self.ports = ports or Ports()
        self._auto_complete = auto_complete
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._runtime: Path | None = None
        # Names the stubs' shared memory, so that what a killed server leaves can be told apart.
        self.shared_memory_prefix = f"dbsam_{uuid.uuid4().hex[:12]}_"

    @property
    def http_url(self) -> str:
        """host:port for HTTP clients on this machine."""
        return f"{self._local}:{self.ports.http}"

    @property
    def grpc_url(self) -> str:
        """host:port for gRPC clients on this machine."""
        return f"{self._local}:{self.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        """host:port of the Prometheus metrics."""
        return f"{self._local}:{self.ports.metrics}"

    @property
    def _local(self) -> str:
        return LOOPBACK if self.host == "0.0.0.0" else self.host  # noqa: S104 - compared only

    @property
    def pid(self) -> int:
        """Process id of the running server.

        Raises:
            ServingError: it does not run.
        """
        if self._process is None or _has_ended(self._process):
            raise ServingError(f"the Triton server is not running; its log is {self.log}")
        return self._process.pid

    def start(self) -> Self:
        """Start the server and return once a request through the ensemble was answered.

        Raises:
            InputError: a port is taken, or the repository is not what was published.
            ServingError: it is running already, ended, or did not answer in time.
        """
        if self._process is not None:
            raise ServingError("this Triton server was started already")
        self.ports = _reserve(self.ports, self.host)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._runtime = Path(tempfile.mkdtemp(prefix="dbsam-triton-"))
        try:
            take_snapshot(self.repository, self._runtime / _MODELS)
            _lay_out_backends(self.environment, self._runtime)
            with self.log.open("wb") as stream:
                self._process = subprocess.Popen(
                    self._command(self._runtime),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=_environment(self.environment),
                    start_new_session=True,  # Ctrl-C reaches us alone; we stop the server
                )
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def _command(self, runtime: Path) -> list[str]:
        command = [
            str(self.environment.binary),
            f"--model-repository={runtime / _MODELS}",
            f"--backend-directory={runtime}",
            f"--http-address={self.host}",
            f"--http-port={self.ports.http}",
            f"--grpc-address={self.host}",
            f"--grpc-port={self.ports.grpc}",
            f"--metrics-address={self.host}",
            f"--metrics-port={self.ports.metrics}",
            "--allow-gpu-metrics=false",
            "--exit-timeout-secs=5",
            f"--backend-config=python,shm-region-prefix-name={self.shared_memory_prefix}",
        ]
        return command if self._auto_complete else [*command, "--disable-auto-complete-config"]

    def _wait_ready(self) -> None:
        process, deadline = self._process, time.monotonic() + self._start_timeout_s
        while process is not None:
            if _has_ended(process):
                raise ServingError(f"tritonserver ended: {self._reason()} (whole log: {self.log})")
            if _is_up(self.http_url):
                probe(self.http_url)
                return
            if time.monotonic() > deadline:
                raise ServingError(
                    f"tritonserver was not ready after {self._start_timeout_s:g} s: "
                    f"{self._reason()} (whole log: {self.log})"
                )
            time.sleep(0.05)

    def _reason(self) -> str:
        """The log's error lines, shortened to what a person reads."""
        lines = self.log_text().splitlines()
        errors = [line.split("] ", 1)[-1] for line in lines if line.startswith("E")]
        errors = [line for line in errors if "cuda" not in line.lower()]  # usual without a GPU
        errors = errors or [line for line in lines if line.startswith("error")] or lines
        return "; ".join(dict.fromkeys(line.strip().strip('"') for line in errors[:2])) or "no log"

    def log_text(self) -> str:
        """What the server has written so far."""
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def check(self) -> None:
        """Prove that the server answers, by a request through the ensemble.

        Raises:
            ServingError: it is not running or does not answer properly.
        """
        _ = self.pid
        probe(self.http_url)

    def wait(self) -> None:
        """Block until the server ends by itself.

        Raises:
            ServingError: it ended; nobody asked it to.
        """
        while self._process is not None and not _has_ended(self._process):
            time.sleep(0.2)
        raise ServingError(
            f"tritonserver ended by itself: {self._reason()} (whole log: {self.log})"
        )

    def stop(self) -> None:
        """Stop the server, remove its backend folder and shared memory; harmless when stopped."""
        process, self._process = self._process, None
        if process is not None:
            if not _has_ended(process):
                process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + _STOP_S
            while not _has_ended(process) and time.monotonic() < deadline:
                time.sleep(0.02)
            # Whatever is left of the group, stubs included. The server is not reaped before this,
            # so its number cannot have become another process's.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _wait_group_gone(process.pid)
        for left in _SHARED_MEMORY.glob(f"{self.shared_memory_prefix}*"):
            left.unlink(missing_ok=True)
        if self._runtime is not None:
            shutil.rmtree(self._runtime)
            self._runtime = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()


def remove_bytecode(folder: Path) -> None:
    """Remove the bytecode of the models' code, so that a server compiles what was checked.

    A container's Python that may write there leaves it, and would run it in place of its source.

    Raises:
        ServingError: a folder of it cannot be removed.
    """
    for found in sorted(folder.rglob(BYTECODE)):
        try:
            shutil.rmtree(found)
        except OSError as error:
            raise ServingError(
                f"{found} may be run in place of the code beside it and cannot be removed "
                f"({error.strerror}): delete it"
            ) from error


def probe(http_url: str, *, timeout_s: float = 120.0) -> None:
    """Send a small image and one box through the ensemble and check the answer's shape.

    The ready flag alone is not proof: it stays up when a Python model's process has died.

    Args:
        http_url: host:port of the server's HTTP endpoint.
        timeout_s: how long the answer may take.

    Raises:
        ServingError: no answer, an error, or not one mask of the image's size.
    """
    side = _PROBE_SIDE
    image = [index % 256 for index in range(side * side * 3)]  # one colour is refused
    values = {
        RAW_IMAGE.name: ([side, side, 3], RAW_IMAGE, image),
        RAW_BOXES.name: ([1, 4], RAW_BOXES, [0.0, 0.0, float(side), float(side)]),
    }
    inputs = [
        {"name": name, "shape": shape, "datatype": TRITON_TYPES[spec.dtype], "data": data}
        for name, (shape, spec, data) in values.items()
    ]
    model = ensemble_spec(1).name
    expected = {MASKS.name: [1, side, side], IOU_SCORES.name: [1]}
    outputs = [{"name": name} for name in expected]
    request = urllib.request.Request(
        f"http://{http_url}/v2/models/{model}/infer",
        data=json.dumps({"inputs": inputs, "outputs": outputs}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
            body = json.load(response)
    except urllib.error.HTTPError as error:
        text = error.read(2000).decode(errors="replace")
        raise ServingError(f"{model} on {http_url} refused the health request: {text}") from error
    except (OSError, ValueError) as error:
        raise ServingError(f"{model} on {http_url} did not answer ({error})") from error
    shapes = {item["name"]: item["shape"] for item in body["outputs"]}
    if shapes != expected:
        raise ServingError(f"{model} on {http_url} answered {shapes}, expected {expected}")


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process ended, without reaping it: `TritonServer.stop` does that."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _wait_group_gone(group: int) -> None:
    """Wait briefly for killed processes to go, so that none still makes shared memory."""
    deadline = time.monotonic() + _KILLED_S
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)


def _is_up(http_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{http_url}/v2/health/ready", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _lay_out_backends(environment: ServerEnvironment, folder: Path) -> None:
    """Copy the Python backend and the stand-ins; Triton refuses links that leave the folder."""
    python = folder / "python"
    python.mkdir()
    source = environment.root / "backends" / "python"
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy2(source / name, python / name)
    shutil.copy2(environment.stub, python / environment.stub.name)
    for standin in sorted(STANDINS.iterdir()):
        (folder / standin.name).mkdir()
        for file in (standin / "model.py", GUARD):
            shutil.copyfile(file, folder / standin.name / file.name)


def _environment(environment: ServerEnvironment) -> dict[str, str]:
    """The child's variables: its own libraries and interpreter, nothing of this one's Python."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    variables.update(PYTHONSAFEPATH="1")  # nothing is imported from the working folder
    libraries: Sequence[str] = [str(path) for path in environment.library_path]
    inherited = [variables["LD_LIBRARY_PATH"]] if variables.get("LD_LIBRARY_PATH") else []
    variables["LD_LIBRARY_PATH"] = ":".join([*libraries, *inherited])
    # The stub embeds Python and takes its prefix from the first python3 on the path.
    binaries = str((environment.folder / "bin").absolute())
    variables["PATH"] = ":".join([binaries, variables.get("PATH", os.defpath)])
    return variables | VARIABLES


def _reserve(ports: Ports, host: str) -> Ports:
    """Check that each port is free and choose a free one where 0 was asked for."""
    sockets, numbers = [], []
    try:
        for option, port in (
            ("http", ports.http),
            ("grpc", ports.grpc),
            ("metrics", ports.metrics),
        ):
            listener = socket.socket()
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
            except (OSError, OverflowError) as error:
                raise InputError(
                    f"cannot listen on {host}:{port} ({error}): choose another with "
                    f"--{option}-port, or stop what uses it"
                ) from error
            numbers.append(listener.getsockname()[1])
    finally:
        for listener in sockets:
            listener.close()
    return Ports(*numbers)
