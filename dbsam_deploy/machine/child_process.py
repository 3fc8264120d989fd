"""A Python in a process of its own: whatever breaks there is an answer here, not an end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import EngineError

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        status: its exit status, or minus the number of the signal that ended it.
        output: its standard output; "" where a log took it.
        log: its standard error, or the whole log.
    """

    status: int
    output: str
    log: str

    @property
    def lines(self) -> list[str]:
        """The log's lines, without colours and blanks."""
        return [line.strip() for line in _COLOURS.sub("", self.log).splitlines() if line.strip()]

    def reason(self, count: int = 1, telling: Sequence[str] = ()) -> str:
        """One line: the error that the process printed, or how it ended and what it said last.

        Args:
            count: how many last lines, where it printed no error.
            telling: lines that say more than the last ones.
        """
        lines = self.lines
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if not said and "Traceback (most recent call last):" in lines:
            said = lines
        if said:
            return " | ".join([said[-1], *telling])
        last = " | ".join(telling or lines[-count:]) or "it said nothing"
        if self.status < 0:
            name = signal.Signals(-self.status).name
            return f"its process was ended by {name}; its last words: {last}"
        return f"its process ended with status {self.status}: {last}"


def python_command(
    arguments: Sequence[str], python: str = sys.executable
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a Python that finds this package if it is this Python.

    Args:
        arguments: of its command line.
        python: the program.
    """
    # No module is taken from the working folder; a Python before 3.11 does not know `-P`.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    earlier = environment.pop("PYTHONPATH", None)  # is meant for this Python alone
    if python == sys.executable:
        # An installed package is found anyway, and its folder would hide Python's own modules
        installed = _PACKAGE_PARENT.name in ("site-packages", "dist-packages")
        paths = [earlier, None if installed else str(_PACKAGE_PARENT)]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    safe = ["-P"] if python == sys.executable else []
    return [python, *safe, *arguments], environment


def run_python(
    arguments: Sequence[str],
    *,
    python: str = sys.executable,
    log: Path | None = None,
    timeout_s: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> Ended:
    """Run a Python to its end; this package can be imported in it if it is this Python.

    Args:
        arguments: of its command line.
        python: the program.
        log: file that takes standard output and error, None to keep both in memory.
        timeout_s: how long it may take.
        variables: changes of the environment.

    Raises:
        EngineError: it does not start, or takes longer.
    """
    command, environment = python_command(arguments, python)
    environment |= variables or {}
    try:
        with nullcontext(subprocess.PIPE) if log is None else log.open("wb") as output:
            ended = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.PIPE if log is None else subprocess.STDOUT,
                env=environment,
                timeout=timeout_s,
                check=False,
            )
        if log is not None:
            return Ended(ended.returncode, "", log.read_text(errors="replace"))
        told = (stream.decode(errors="replace") for stream in (ended.stdout, ended.stderr))
        return Ended(ended.returncode, *told)
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"no answer within {timeout_s:g} s") from error
    except OSError as error:
        raise EngineError(f"{python} does not start: {error}") from error
