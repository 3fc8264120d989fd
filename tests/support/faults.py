"""A disk that fails, or a process that dies, at the k-th call that changes a file system."""

from __future__ import annotations

import builtins
import functools
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from dbsam_deploy.files import publication
from dbsam_deploy.files.sources import PACKAGE

CALLS = ("replace", "rename", "fsync", "ftruncate", "unlink", "remove", "mkdir", "rmdir", "write")
"""Functions of `os` that a fault can hit, beside `open` for writing, each write, and exchange."""


class Killed(BaseException):
    """The process ended: nothing that follows, no cleaning up either, reaches the disk."""


class Faults:
    """Counts the calls, and lets one of them fail.

    Args:
        at: number of the call, from 1; 0 for none.
        error: errno that the call gets; 0 for the end of the process.
        lasting: whether later calls that need space fail as well.
    """

    def __init__(self, at: int = 0, error: int = 0, *, lasting: bool = False) -> None:
        self._at, self._error, self._lasting = at, error, lasting
        self.calls: list[str] = []
        self.places: list[tuple[str, str]] = []
        self.dead = False

    def hit(self, name: str) -> bool:
        """Count a call.

        Returns:
            Whether a write is to stop half-way: it is the one at which the process ends.

        Raises:
            Killed: the process ended before, or ends here.
            OSError: the disk refuses.
        """
        if self.dead:
            raise Killed
        self.calls.append(name)
        if not self._at:  # `points` is asked of what nothing befell
            self.places.append((name, _our_lines()))
        number = len(self.calls)
        if self._at and number == self._at and not self._error:
            self.dead = True
            if name in ("stream write", "sendfile"):
                return True
            raise Killed
        lasts = self._lasting and name not in ("unlink", "remove", "rmdir")
        if self._error and (number == self._at or (lasts and number > self._at)):
            raise OSError(self._error, os.strerror(self._error))
        return False

    def points(self, through: str = "") -> list[int]:
        """The first and the last call of each kind from each place of ours, as numbers.

        A line may copy or remove fifty files; what is there after the twentieth is like what is
        there after the first.

        Args:
            through: part of the places' description, such as a function's name.
        """
        numbered = [(n, place) for n, place in enumerate(self.places, 1) if through in place[1]]
        first = {place: number for number, place in reversed(numbered)}
        last = {place: number for number, place in numbered}
        return sorted({*first.values(), *last.values()})


def _our_lines() -> str:
    """The lines of the package that the call comes from, with their functions."""
    frame: FrameType | None = sys._getframe(2)
    found: list[str] = []
    while frame is not None:
        if name := _our_function(frame.f_code):
            found.append(f"{name}:{frame.f_lineno}")
        frame = frame.f_back
    return " ".join(found)


@functools.cache
def _our_function(code: CodeType) -> str:
    ours = code.co_filename.startswith(str(PACKAGE))
    return f"{Path(code.co_filename).stem}.{code.co_name}" if ours else ""


class _Raw(io.FileIO):
    """A file whose writes are counted; the one that ends the process writes a half."""

    faults: Faults

    def write(self, data: Any) -> int:
        if self.faults.dead:
            return memoryview(data).nbytes  # goes nowhere
        if self.faults.hit("stream write"):
            super().write(memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
            raise Killed
        return super().write(data) or 0


class _Patched:
    """What stands for Python's own functions."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._open, self._os_open, self._sendfile = io.open, os.open, os.sendfile
        self._exchange = publication.exchange

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
        if not set(mode) & set("wxa+"):
            return self._open(file, mode, buffering, *rest, **more)
        if not isinstance(file, int):
            self._faults.hit("open")
        raw = _Raw(file, mode.replace("b", "").replace("t", ""))
        raw.faults = self._faults
        stream = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        if "b" in mode:
            return stream
        names = ("encoding", "errors", "newline")
        return io.TextIOWrapper(stream, **dict(zip(names, rest, strict=False)), **more)

    def os_open(self, path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._faults.hit("os.open")
        return self._os_open(path, flags, *rest, **more)

    def sendfile(self, out: int, source: int, offset: int, count: int) -> int:
        if self._faults.hit("sendfile"):
            self._sendfile(out, source, offset, os.fstat(source).st_size // 2)
            raise Killed
        return self._sendfile(out, source, offset, count)

    def exchange(self, *names: Any) -> bool:
        self._faults.hit("exchange")
        return self._exchange(*names)

    def counted(self, name: str) -> Any:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self._faults.hit(name)
            return real(*arguments, **options)

        return call


@contextmanager
def no_waiting() -> Iterator[None]:
    """What is written inside the block reaches the disk when the system likes, for power cuts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@contextmanager
def injected(faults: Faults) -> Iterator[Faults]:
    """Let all that Python writes inside the block go through `faults`."""
    ours = _Patched(faults)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)  # it is counted, and is for power cuts
        for name in CALLS:
            patch.setattr(os, name, ours.counted(name))
        patch.setattr(os, "open", ours.os_open)
        patch.setattr(os, "sendfile", ours.sendfile)
        patch.setattr(io, "open", ours.open)
        patch.setattr(builtins, "open", ours.open)
        patch.setattr(publication, "exchange", ours.exchange)
        yield faults
