"""A server's log: appended to, rotated, with one writer, and what it said since it was started."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import IO

from ..core.errors import InputError
from ..files.atomic import locked, writing_to

MAX_BYTES = 10_000_000
KEPT = 5
"""Size at which a log is moved aside, and how many earlier ones are kept (`.1` is the newest)."""

STANDARD_OUTPUT = Path("-")

_LINES = 5000
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)


class ServerLog:
    """The file that takes a server's output and the events around it.

    Args:
        path: the log; made with its folder, an existing one is continued. `STANDARD_OUTPUT` leaves
            all of that to who reads this process's output.
        max_bytes: size at which it is moved aside.

    Raises:
        InputError: another server writes it, or it cannot be written.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._turn = threading.Lock()
        self._said: deque[str] = deque(maxlen=_LINES)
        self._first_said = threading.Event()
        self._pump: threading.Thread | None = None
        self._rotates = path != STANDARD_OUTPUT
        if not self._rotates:
            self._handle = os.dup(1)
            return
        with writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = _open(path)

    def event(self, text: str) -> None:
        """Write a line of our own, with the time."""
        self._write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} dbsam: {text}\n".encode())

    def follow(self, output: IO[bytes]) -> None:
        """Take the output of a server that was just started, until it ends, in a thread."""
        self._said.clear()
        self._first_said.clear()
        self._pump = threading.Thread(target=self._copy, args=(output,), daemon=True)
        self._pump.start()

    def text(self) -> str:
        """What the server has said since `follow`, at most the last few thousand lines."""
        return "\n".join(tuple(self._said))

    def wait_for_first_line(self, seconds: float) -> bool:
        """Whether the server said something within `seconds`."""
        return self._first_said.wait(seconds)

    def finish(self) -> None:
        """Wait briefly for the last words of a server that has ended."""
        if self._pump is not None:
            self._pump.join(2.0)

    def close(self) -> None:
        """Close the file; another server may write it then."""
        self.finish()
        with self._turn:
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1

    def _copy(self, output: IO[bytes]) -> None:
        with output:
            for line in output:
                self._said.append(line.decode(errors="replace").rstrip("\n"))
                self._first_said.set()
                self._write(line)

    def _write(self, line: bytes) -> None:
        with self._turn:
            if self._handle < 0:
                return
            try:
                if self._rotates and os.fstat(self._handle).st_size + len(line) > self._max_bytes:
                    self._rotate()
                os.write(self._handle, line)
            except OSError:
                return  # a full disk must not stop the server, whose output would wait for us

    def _rotate(self) -> None:
        for number in range(KEPT, 0, -1):
            earlier = self.path if number == 1 else _numbered(self.path, number - 1)
            if earlier.exists():
                earlier.replace(_numbered(self.path, number))
        fresh = _open(self.path)
        os.close(self._handle)
        self._handle = fresh


def reason_in(text: str) -> str:
    """The error lines of what a server said, shortened to what a person reads."""
    lines = text.splitlines()
    errors = [line.split("] ", 1)[-1] for line in lines if line.startswith("E")]
    errors = [line for line in errors if "cuda" not in line.lower()]  # usual without a GPU
    errors = errors or [line for line in lines if line.startswith("error")]
    errors = errors or [line.split("] ", 1)[-1] for line in lines[-2:]]
    return "; ".join(dict.fromkeys(line.strip().strip('"') for line in errors[:2])) or "no log"


def free_log(folder: Path, stem: str) -> Path:
    """The first of `stem.log`, `stem-2.log`, … in `folder` that no server writes now."""
    number, path = 1, folder / f"{stem}.log"
    while path.exists() and _is_locked(path):
        number += 1
        path = folder / f"{stem}-{number}.log"
    return path


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _is_locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _is_taken(handle)
    finally:
        os.close(handle)


def _is_taken(handle: int) -> bool:
    try:
        return not locked(handle)
    except OSError:
        return False  # a file system without locks


def _open(path: Path) -> int:
    handle = os.open(path, _FLAGS, 0o600)
    if _is_taken(handle):
        os.close(handle)
        raise InputError(f"{path} is the log of a server that runs; name another one with --log")
    return handle
