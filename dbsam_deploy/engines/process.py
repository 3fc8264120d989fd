"""Runs `engines.worker` and turns its end, whatever it was, into an answer or an `EngineError`."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..core.errors import EngineError
from ..machine.child_process import run_python
from ..machine.cuda_errors import explained
from .device import Gpu
from .kinds import Kind, import_kind
from .network import BuildJob

_WORKER = f"{__package__}.worker"
_LAST_LINES = 4
_DESCRIBE_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Builder:
    """An installed builder.

    Attributes:
        kind: which one.
        version: of TensorRT or TensorRT-RTX.
        cuda: CUDA version of its package, "" if it does not say.
        targets: compute capabilities that it builds for on this machine.
        gpu: GPU of this machine, None without one.
    """

    kind: Kind
    version: str
    cuda: str
    targets: tuple[str, ...]
    gpu: Gpu | None


def describe_builder(kind: Kind) -> Builder:
    """Ask a builder what it is, in a process of its own.

    Raises:
        EngineError: it is not installed, too old or broken.
    """
    failure = f"{kind.title} does not start"
    if find_spec(kind.module) is None:  # said without a process, which takes 0.2 s
        try:
            import_kind(kind)
        except EngineError as error:
            raise EngineError(f"{failure}: {error}") from error
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "worker.log"
        answer = _run(
            ["--describe", kind.name],
            Path(scratch) / "answer.json",
            log,
            failure,
            timeout_s=_DESCRIBE_TIMEOUT_S,
        )
    gpu = answer["gpu"]
    return Builder(
        kind=kind,
        version=answer["version"],
        cuda=answer["cuda"],
        targets=tuple(answer["targets"]),
        gpu=None if gpu is None else Gpu(**gpu),
    )


def run_job(job: BuildJob, folder: Path, graph: str) -> dict[str, Any]:
    """Build one engine in a process of its own; see `worker.build` for the answer.

    Args:
        job: what to build.
        folder: where its log, and after a failure its job file, are left.
        graph: name for messages and files.

    Raises:
        EngineError: the builder refused or its process ended, with its last lines.
    """
    job_file, log = folder / f"{graph}.job.json", folder / f"{graph}.build.log"
    job_file.write_text(job.to_json())
    with tempfile.TemporaryDirectory() as scratch:
        answer = _run(
            ["--job", str(job_file)],
            Path(scratch) / "answer.json",
            log,
            f"{job.kind} built no engine of {graph}",
            keep=f"whole log: {log}; job: {job_file}",
        )
    job_file.unlink()
    if not log.stat().st_size:
        log.unlink()
    return answer


def _run(
    arguments: list[str],
    answer: Path,
    log: Path,
    failure: str,
    *,
    keep: str = "",
    timeout_s: float | None = None,
) -> dict[str, Any]:
    command = ["-m", _WORKER, *arguments, "--answer", str(answer)]
    try:
        ended = run_python(command, log=log, timeout_s=timeout_s)
    except EngineError as error:
        raise EngineError(f"{failure}: {error.message}") from error
    if ended.status == 0 and answer.is_file():
        body: dict[str, Any] = json.loads(answer.read_text())
        return body
    builder = [_message(line) for line in ended.lines if "[E]" in line or "[F]" in line]
    reason = explained(ended.reason(_LAST_LINES, telling=builder[-_LAST_LINES:]))
    raise EngineError(f"{failure}: {reason}", *filter(None, [keep]))


def _message(line: str) -> str:
    """A line of the builder's log without its time and severity."""
    return line.split("] ", 3)[-1] if line.startswith("[") else line
