"""In the process of a step: runs its checks one after the other, and tells each one's verdict.

Standard output is the line to the process that waits; what libraries print there goes to the log.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from ..core.errors import DbsamError, MissingError
from .verdicts import CheckFunction, Context, Judgement, NotRunError, Step, Verdict

MAIN = "from dbsam_deploy.validation.worker import main; main()"
"""What its Python is told to run."""
TABLE = "dbsam_deploy.validation.steps:STEPS"
"""Module and name of the steps."""


def read_table(table: str) -> dict[str, Step]:
    """Name → step of a table."""
    module, _, name = table.partition(":")
    return {step.name: step for step in getattr(importlib.import_module(module), name)}


def _end_with_parent() -> None:
    """End this process and all that it started when the one that waits for it has ended."""
    while os.read(0, 1):  # nothing comes but the end
        pass
    os.killpg(0, signal.SIGKILL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Let a check that is not wanted any more stop what it has started."""
    raise KeyboardInterrupt


def _go_first() -> None:
    """Where memory runs out, let the system end this process and not the one that waits."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def _tell(out: int, body: Mapping[str, Any]) -> None:
    os.write(out, json.dumps(body).encode() + b"\n")


def _plain(value: Any) -> Any:
    """A figure as JSON has it: no NaN, six digits, nothing of NumPy."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else str(number)


def one_line(text: str) -> str:
    """A text without breaks, at most as long as a line of a report may be."""
    words = " ".join(text.split())
    return words if len(words) <= 400 else f"{words[:397]}…"


def judge(step: str, name: str, check: CheckFunction, context: Context) -> Judgement:
    """Run one check in this process."""
    start = time.monotonic()
    verdict, text, advice, figures = Verdict.PASS, "", "", {}
    try:
        found = check(context)
        text, figures = found.text, dict(found.figures)
    except NotRunError as error:
        verdict, text, advice = Verdict.NOT_RUN, error.message, error.advice
    except MissingError as error:
        verdict, text, advice = Verdict.NOT_RUN, error.what, error.install
    except DbsamError as error:
        verdict, text = Verdict.FAIL, ": ".join((error.message, *error.details[:1]))
        traceback.print_exc()
    except Exception as error:  # whatever breaks is this check's verdict
        verdict, text = Verdict.FAIL, f"{type(error).__name__}: {error}"
        traceback.print_exc()
    seconds = round(time.monotonic() - start, 2)
    return Judgement(step, name, verdict, one_line(text), advice, seconds, _plain(figures))


def main(argv: list[str] | None = None) -> None:
    """Run the checks that the command line names: table, step, context as JSON, checks."""
    table, name, told, *names = sys.argv[1:] if argv is None else argv
    out = os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _go_first()
    body = json.loads(told)
    context = Context(**{key: value and Path(value) for key, value in body.items()})
    status = 1
    try:
        _run_all(read_table(table)[name], names, context, out)
        status = 0
    except KeyboardInterrupt:
        print("ended from outside", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)  # a library that fails while Python ends has been judged all the same


def _run_all(step: Step, names: list[str], context: Context, out: int) -> None:
    """Run checks until one fails: a GPU that has failed fails all that follows."""
    for check in names:
        _tell(out, {"begin": check})
        outcome = judge(step.name, check, step.checks[check], context)
        _tell(out, {"end": asdict(outcome)})
        if outcome.verdict == Verdict.FAIL:
            break
