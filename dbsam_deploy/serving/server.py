"""The real `tritonserver` as a child process: start, prove it answers, read its log, stop."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any, Self

from ..core.bls import STAGES_VARIABLE
from ..core.errors import InputError, ServingError
from ..core.front import DRAINING
from .compiled import CompiledGraphs, put_compiled
from .control import Control, new_key, requests_in_flight, restriction
from .drain import unsent_bytes, wait_until_answered
from .environment import ServerEnvironment
from .known_answer import compare
from .ports import LOOPBACK, Ports, network_warning, reserve
from .probe import BOXES_MODEL, ask, is_up
from .processes import (
    SHARED_MEMORY,
    claim_shared_memory,
    end_group,
    ended_children,
    free_left_shared_memory,
    free_shared_memory,
    has_ended,
    hide_word,
    how_ended,
    little_memory_warning,
    start_tied,
)
from .runtime import (
    CONTROL,
    MODELS,
    backends,
    lay_out,
    make_runtime,
    remove_left_runtimes,
    server_variables,
)
from .server_log import ServerLog, reason_in
from .snapshot import take_snapshot
from .stages import new_ending, rename_stages, renamed_path

_DEAD_WHILE_LOADING_S, _STARTS = 5.0, 3
_GIVES_UP = "Waiting for in-flight requests to complete."
"""What Triton says before it is ready only if a model did not load; ending takes it seconds."""
_STARVED = ("interprocess::lock_exception", "is not healthy")
"""Triton 24.10 where a model's process, on a busy machine, kept it waiting at a lock for 10 s."""


class TritonServer:
    """A `tritonserver` process on one model repository; a context manager.

    The onnxruntime and tensorrt backends are NVIDIA's in its container; elsewhere they are this
    library's CPU stand-ins, and say so in the log. The server gets a private copy of the
    repository, which was checked when it was made and is removed when the server stops: nothing
    that happens to the repository reaches it. It is killed when the thread that started it ends.

    Args:
        repository: folder filled by `repository.build_repository`.
        environment: checked server environment.
        log: file for the server's output and the events around it, continued; `-` is standard
            output.
        ports: ports to listen on.
        host: address to listen on; anything but the loopback opens the server to the network.
        key: opens Triton's own APIs (`control.RESTRICTED`); None for a random one.
        grace_s: how long requests that were accepted may take after `drain` was called.
        compiled: what runs in place of the repository's ONNX files, from the stand-ins.
        expose_stages: let clients ask the single stages by their names, for debugging.
        auto_complete: let Triton complete configurations; ours are complete, so this costs seconds
            and is for tests.
        start_timeout_s: how long loading the models may take.

    Raises:
        InputError: an unusable key.
    """

    def __init__(
        self,
        repository: Path,
        environment: ServerEnvironment,
        *,
        log: Path,
        ports: Ports | None = None,
        host: str = LOOPBACK,
        key: str | None = None,
        grace_s: float = 30.0,
        compiled: CompiledGraphs | None = None,
        expose_stages: bool = False,
        auto_complete: bool = False,
        start_timeout_s: float = 300.0,
    ) -> None:
        self.repository = repository
        self.environment = environment
        self.log = log
        self.host = host
        self.ports = ports or Ports()
        self.key = new_key(key)
        self.grace_s = grace_s
        self.compiled = compiled
        self._auto_complete = auto_complete
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._runtime: Path | None = None
        self._runtime_lock = -1
        self._output: ServerLog | None = None
        self._leash = -1
        self._plugins = ""
        self._said = ""
        self.known_answers: dict[str, Any] = {}
        self.ending = "" if expose_stages else new_ending()
        # Names the stubs' shared memory, so that what a killed server leaves can be told apart.
        self.shared_memory_prefix = f"dbsam_{os.getpid()}_{uuid.uuid4().hex[:12]}_"

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
    def folder(self) -> Path:
        """Its private folder, which is there while it runs.

        Raises:
            ServingError: it does not.
        """
        if self._runtime is None:
            raise ServingError("this Triton server was not started")
        return self._runtime

    @property
    def control(self) -> Control:
        """The owner's calls."""
        return Control(self.http_url, self.key)

    @property
    def pid(self) -> int:
        """Process id of the running server.

        Raises:
            ServingError: it does not run.
        """
        if self._process is None or has_ended(self._process):
            raise ServingError(f"the Triton server is not running; its log is {self.log}")
        return self._process.pid

    def start(self) -> Self:
        """Start the server and return once a request through the ensemble was answered.

        Raises:
            InputError: a port is taken, the log belongs to another server, or the repository is
                not what was published.
            ServingError: it is running already, ended, or did not answer in time.
        """
        if self._runtime is not None:
            raise ServingError("this Triton server was started already")
        self.ports = reserve(self.ports, self.host)
        try:
            self._output = ServerLog(self.log)
            if warning := network_warning(self.host, self.environment):
                self.event(warning)
            self._remove_leftovers()
            self._runtime, self._runtime_lock = make_runtime()
            copied = take_snapshot(self.repository, self._runtime / MODELS)
            rename_stages(self._runtime / MODELS, self.ending)
            if self.compiled is not None:
                put_compiled(self._runtime / MODELS, copied, self.compiled, self.ending)
                self.event(f"graphs run on {self.compiled.note}")
            self._plugins = renamed_path(copied.plugins, self.ending)
            self.known_answers = copied.known_answers
            lay_out(self.environment, self._runtime)
            if warning := little_memory_warning():
                self.event(warning)
            self._launch_patiently()
        except BaseException:
            self.stop()
            raise
        return self

    def _launch_patiently(self) -> None:
        for left in reversed(range(_STARTS)):
            try:
                return self._launch()
            except ServingError as error:
                if not left or not any(word in error.message for word in _STARVED):
                    raise
                self.event(f"{error.message}; this machine is busy: starting again")
            self._end()

    def _remove_leftovers(self) -> None:
        memory = [f"{SHARED_MEMORY / prefix}*" for prefix in free_left_shared_memory()]
        for left in (*memory, *remove_left_runtimes()):
            self.event(f"removed what a server that was killed had left: {left}")

    def restart(self) -> None:
        """End the process at once and start another one on the same ports, files and key.

        Raises:
            ServingError: see `start`; the server is stopped then, and may be started so again.
        """
        _ = self.folder
        self._end()
        try:
            reserve(self.ports, self.host)
            self._launch()
        except InputError as error:
            raise ServingError(error.message) from error

    def event(self, text: str) -> None:
        """Write a line into the log."""
        if self._output is not None:
            self._output.event(text)

    def _launch(self) -> None:
        runtime, output = self._runtime, self._output
        assert runtime is not None  # noqa: S101 - for the type checker
        assert output is not None  # noqa: S101
        lock = claim_shared_memory(self.shared_memory_prefix)
        try:
            variables = server_variables(self.environment, runtime)
            variables[STAGES_VARIABLE] = self.ending
            process, self._leash = start_tied(self._command(runtime), variables, lock)
        finally:
            os.close(lock)
        self._process = process
        assert process.stdout is not None  # noqa: S101
        output.follow(process.stdout)
        # It has read its command line before it says anything.
        if output.wait_for_first_line(10.0) and not hide_word(process.pid, self.key):
            self.event("this system lets nobody hide the key: the server's command line shows it")
        self._wait_ready(process)

    def _command(self, runtime: Path) -> list[str]:
        command = [
            str(self.environment.binary),
            f"--model-repository={runtime / MODELS}",
            f"--backend-directory={backends(self.environment, runtime)}",
            # Only so can a model whose process has died be loaded anew.
            "--model-control-mode=explicit",
            "--load-model=*",
            f"--http-address={self.host}",
            f"--http-port={self.ports.http}",
            f"--grpc-address={self.host}",
            f"--grpc-port={self.ports.grpc}",
            "--grpc-infer-allocation-pool-size=0",  # else eight answers stay, of up to 1 GiB each
            f"--metrics-address={self.host}",
            f"--metrics-port={self.ports.metrics}",
            f"--allow-gpu-metrics={str(self.environment.is_installation).lower()}",
            "--metrics-config=summary_latencies=true",  # p99 of each model
            f"--exit-timeout-secs={max(1, round(self.grace_s))}",
            f"--backend-config=python,shm-region-prefix-name={self.shared_memory_prefix}",
            *restriction(self.key),
        ]
        if self._plugins and self.environment.is_installation:
            plugins = runtime / MODELS / self._plugins
            command.append(f"--backend-config=tensorrt,plugins={plugins}")
        return command if self._auto_complete else [*command, "--disable-auto-complete-config"]

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        start = time.monotonic()
        dead_since: float | None = None
        while True:
            now = time.monotonic()
            if has_ended(process):
                raise ServingError(self.why_ended(loading=True))
            if _GIVES_UP in self.log_text():
                raise ServingError(f"tritonserver cannot load its models: {self._reason()}")
            if is_up(self.http_url):
                self.check()
                return
            if not ended_children(process.pid):
                dead_since = None
            elif dead_since is None:
                dead_since = now
            elif now - dead_since > _DEAD_WHILE_LOADING_S:
                raise ServingError(
                    f"the process of a model ended while it was loaded: {self._reason()}"
                )
            if now - start > self._start_timeout_s:
                late = f"tritonserver was not ready after {self._start_timeout_s:g} s"
                raise ServingError(f"{late}: {self._reason()}")
            time.sleep(0.05)

    def _reason(self) -> str:
        return f"{reason_in(self.log_text())} (whole log: {self.log})"

    def log_text(self) -> str:
        """What the server has written since it was started; of a long log the end."""
        return self._said if self._output is None else self._output.text()

    def check(self) -> None:
        """Prove that the server answers, and answers right, by a request through the ensemble.

        Raises:
            ServingError: it is not running or does not answer properly.
        """
        _ = self.pid
        self.ask(BOXES_MODEL)

    def ask(self, model: str, *, timeout_s: float = 120.0) -> None:
        """Prove it of one model.

        Args:
            model: one of `probe.SERVED`.
            timeout_s: how long the answer may take.

        Raises:
            ServingError: no answer, or not the one that the repository knows.
        """
        compare(model, ask(self.http_url, model, timeout_s=timeout_s), self.known_answers)

    @property
    def has_ended(self) -> bool:
        """Whether its process is gone."""
        return self._process is None or has_ended(self._process)

    def why_ended(self, *, loading: bool = False) -> str:
        """One line about a server that ended without being asked to.

        Args:
            loading: its words are the reason; Triton 24.10 may crash while it gives a model up.
        """
        if self._process is None or self._output is None:
            return f"tritonserver does not run (log: {self.log})"
        self._output.finish()
        how = how_ended(self._process)
        if loading or not how.startswith("by "):
            return f"tritonserver ended {how}: {self._reason()}"
        return f"tritonserver ended {how} (whole log: {self.log})"

    def drain(self) -> bool:
        """Let the models refuse what is new; wait, at most `grace_s`, until clients have the rest.

        Returns:
            Whether all accepted requests were answered.
        """
        if self._runtime is None:
            return True
        (self._runtime / CONTROL / DRAINING).touch()
        return wait_until_answered(self._is_answering, lambda: self.has_ended, self.grace_s)

    def _is_answering(self) -> bool:
        try:
            at_work = requests_in_flight(self.metrics_url)
        except ServingError:  # too busy to say so
            return True
        return at_work > 0 or unsent_bytes({self.ports.http, self.ports.grpc}) > 0

    def stop(self) -> None:
        """Stop the server at once, remove its folder and shared memory; harmless when stopped.

        Requests that it still works on are cut off; `drain` waits for them. Nothing else would be
        gained by Triton's own way to end, which takes seconds, and its whole timeout where a
        model's process has died before.
        """
        self._end()
        if self._output is not None:
            self._said = self._output.text()
            self._output.close()
            self._output = None
        if self._runtime is not None:
            shutil.rmtree(self._runtime)
            os.close(self._runtime_lock)
            self._runtime = None

    def _end(self) -> None:
        """End the process, its stubs included, and free its shared memory."""
        process, self._process = self._process, None
        if process is not None:
            end_group(process)
            os.close(self._leash)
            if self._output is not None:
                self._output.finish()
            free_shared_memory(self.shared_memory_prefix)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()
