"""Steps of a validation for tests: checks that pass, fail, lie, crash and hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from dbsam_deploy.core.errors import AccuracyError, MissingError
from dbsam_deploy.validation.verdicts import Context, NotRunError, Passed, Step

TABLE = "support.validation_steps:"


def good(context: Context) -> Passed:
    print("what a library says on standard output")
    figures = {"ms": np.float32(1.5), "worst": float("nan"), "nodes": [np.int64(3)], "on": True}
    return Passed("as it should\nbe", figures)


def lie(context: Context) -> Passed:
    raise AccuracyError("largest error 3, at most 1")


def bug(context: Context) -> Passed:
    raise ZeroDivisionError("nobody thought of it")


def absent(context: Context) -> Passed:
    raise MissingError("it needs tensorrt, which is not installed", "pip install tensorrt")


def nothing_here(context: Context) -> Passed:
    raise NotRunError("no such thing here", "apt-get install it")


def memory(context: Context) -> Passed:
    raise MemoryError


def die(number: int, context: Context) -> Passed:
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), number)
    time.sleep(60)
    raise AssertionError


def leave(context: Context) -> Passed:
    print("gone", file=sys.stderr, flush=True)
    os._exit(3)


def hang(context: Context) -> Passed:
    """Hangs together with a process that it has started."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    context.folder.mkdir(parents=True, exist_ok=True)
    (context.folder / "pids").write_text(f"{os.getpid()} {child.pid}")
    try:
        time.sleep(600)
    finally:
        (context.folder / "tidy").touch()
    raise AssertionError


def nap(context: Context) -> Passed:
    time.sleep(0.4)
    return Passed("awake")


def once(name: str, break_it: Callable[[str, Context], None], context: Context) -> Passed:
    """Passes, but for its first time."""
    mark = context.folder / f"{name}.mark"
    if not mark.exists():
        mark.write_text("")
        break_it(name, context)
    return Passed("done")


def _kill_parent(name: str, context: Context) -> None:
    """Once the report says that this check runs."""
    while not json.loads((context.report / "report.json").read_text())["running"].endswith(name):
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def _not_yet(name: str, context: Context) -> None:
    raise NotRunError("not yet")


BAD = (
    Step(
        "bad",
        "all that can go wrong",
        "nothing",
        {
            "good": good,
            "lie": lie,
            "bug": bug,
            "absent": absent,
            "nothing here": nothing_here,
            "memory": memory,
            "segfault": partial(die, signal.SIGSEGV),
            "abort": partial(die, signal.SIGABRT),
            "killed": partial(die, signal.SIGKILL),
            "left": leave,
            "last": good,
        },
        20,
    ),
)
HANGS = (Step("hangs", "one that hangs", "nothing", {"hang": hang, "after": good}, 1.5),)
PATIENT = (Step("patient", "one that hangs", "nothing", {"hang": hang}, 600),)
NAPS = (Step("naps", "slow ones", "nothing", {f"nap {i}": nap for i in range(50)}, 30),)
DEADLY = (
    Step("first", "", "", {"a": good, "b": partial(once, "b", _kill_parent)}, 20),
    Step("second", "", "", {"c": partial(once, "c", _kill_parent), "d": good}, 20),
    Step("third", "", "", {"e": partial(once, "e", _kill_parent)}, 20),
)
LATER = (
    Step("one", "", "", {"a": good, "b": partial(once, "b", _not_yet)}, 20),
    Step("two", "", "", {"c": lie, "d": absent}, 20),
)
