"""Runs a step's checks in processes of their own: crashes, hangs and lost memory are verdicts.

A process runs checks until one fails; what is left gets a new one.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from ..machine.child_process import Ended, python_command
from .verdicts import Context, Judgement, Step, Verdict
from .worker import MAIN, TABLE, one_line

Began = Callable[[str], None]
"""Told the name of the check that begins."""
TIDY_S, KILLED_S, LITTLE_S = 8.0, 10.0, 0.5
"""How long a process that has to end may take for it, how long a killed one is waited for; with how
little time left nothing is begun."""


class Deadline:
    """When the whole validation has to end.

    Args:
        budget_s: seconds from now, None for no end.
    """

    def __init__(self, budget_s: float | None) -> None:
        self._end = None if budget_s is None else time.monotonic() + budget_s

    @property
    def left_s(self) -> float:
        """Seconds that are left, infinite without an end."""
        return float("inf") if self._end is None else self._end - time.monotonic()


def run_checks(
    step: Step,
    names: list[str],
    context: Context,
    deadline: Deadline,
    began: Began = lambda name: None,
    *,
    table: str = TABLE,
) -> Iterator[Judgement]:
    """The outcome of each check, as soon as it is known.

    Args:
        step: whose checks.
        names: of the checks.
        context: see `Context`.
        deadline: what is not begun or not done by then is out of time.
        began: told each check that begins.
        table: see `worker.TABLE`.
    """
    left = list(names)
    while left:
        if deadline.left_s <= LITTLE_S:
            for name in left:
                yield Judgement(step.name, name, Verdict.OUT_OF_TIME, "not begun")
            return
        for outcome in _one_process(step, left, context, deadline, began, table):
            left.remove(outcome.check)
            yield outcome


def _one_process(
    step: Step, names: list[str], context: Context, deadline: Deadline, began: Began, table: str
) -> Iterator[Judgement]:
    """Outcomes of the checks that one process has run: at least one."""
    log = context.folder / "logs" / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    told = {key: value and str(value) for key, value in asdict(context).items()}
    words = ["-c", MAIN, table, step.name, json.dumps(told), *names]
    size = log.stat().st_size if log.exists() else 0
    current, start, done = names[0], time.monotonic(), False
    with _started(words, log) as (process, lines):
        while True:
            limit = min(step.limit_s, deadline.left_s + time.monotonic() - start)
            try:
                line = lines.get(timeout=max(0.0, start + limit - time.monotonic()))
            except queue.Empty:
                yield _too_long(step, current, deadline, time.monotonic() - start)
                return
            if line is None:
                break
            body: dict[str, Any] = json.loads(line)
            if "begin" in body:
                current, done = body["begin"], False
                began(current)
            else:
                found = body["end"]
                done = True
                yield Judgement(**{**found, "verdict": Verdict(found["verdict"])})
                start = time.monotonic()
        status = process.wait()
    if not done:
        with log.open("rb") as stream:
            stream.seek(size)
            ended = Ended(status, "", stream.read().decode(errors="replace"))
        seconds = round(time.monotonic() - start, 2)
        yield Judgement(step.name, current, Verdict.FAIL, one_line(ended.reason()), seconds=seconds)


def _too_long(step: Step, name: str, deadline: Deadline, seconds: float) -> Judgement:
    verdict, text = Verdict.FAIL, f"no answer within {step.limit_s:g} s"
    if deadline.left_s <= 0 and seconds < step.limit_s:
        verdict, text = Verdict.OUT_OF_TIME, f"not done after {seconds:.0f} s"
    return Judgement(step.name, name, verdict, text, seconds=round(seconds, 2))


@contextmanager
def _started(
    words: list[str], log: Path
) -> Iterator[tuple[subprocess.Popen[bytes], queue.Queue[bytes | None]]]:
    """A worker and its lines, None at their end; at the end of the block all of it is gone."""
    command, environment = python_command(words)
    with log.open("ab") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # its end tells the worker that this process has ended
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
    lines: queue.Queue[bytes | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    try:
        yield process, lines
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):  # a server that it has started cleans up
            process.wait(TIDY_S)
        with suppress(ProcessLookupError, PermissionError):
            _kill_all(process)
        with suppress(subprocess.TimeoutExpired):  # a driver may keep even a killed one
            process.wait(KILLED_S)
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker with what it has started, which a worker that has ended leaves too."""
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)


def _read(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    with suppress(ValueError):  # it was closed
        for line in stream:
            lines.put(line)
    lines.put(None)
