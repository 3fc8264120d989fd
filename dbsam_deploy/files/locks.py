"""One writer of a folder at a time, and who it is.

A lock is a file that its process holds by `flock`, so the system frees it when the process ends in
any way, on another host of a network file system as well. `filelock` would do, but what waits would
not learn who it waits for, and its file stays behind.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.errors import InputError
from .atomic import is_file_at, locked, writing_to

LOCK_NAME = ".dbsam.lock"
"""Of the lock inside a folder that a command fills."""
POLL_SECONDS = 0.2

_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)


def say_nothing(text: str) -> None:
    """For callers that show no messages."""


@contextmanager
def one_writer(
    folder: Path,
    *,
    wait: bool = True,
    say: Callable[[str], None] = say_nothing,
    name: str = LOCK_NAME,
) -> Iterator[None]:
    """Keep other writers out of `folder` until the block ends; it is made if it is not there.

    Args:
        folder: what is written.
        wait: for another writer to end; else it is refused.
        say: told whom it waits for.
        name: of the lock's file in `folder`; writers with other names do not meet.

    Raises:
        InputError: there is another writer and `wait` is false, or `folder` cannot be written.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = folder / name
    handle = _take(lock, say)
    if handle is None:
        owner = _owner(lock)
        if not wait:
            raise InputError(
                f"{folder} is being written by {owner}; wait until it has ended, or name another "
                "folder"
            )
        say(f"waiting for {owner}, which writes {folder}")
        while (handle := _take(lock, say)) is None:
            time.sleep(POLL_SECONDS)
    is_done = False
    try:
        yield
        is_done = True
    finally:
        try:
            with suppress(OSError):
                lock.unlink()  # before it is free: whoever waits sees that it is gone
        finally:
            os.close(handle)
            if not is_done:
                _remove_empty(new)


def _remove_empty(folders: list[Path]) -> None:
    """What was made for a lock and was not filled; the inner folders come first."""
    with suppress(OSError):
        for path in folders:
            path.rmdir()


def _take(lock: Path, say: Callable[[str], None]) -> int | None:
    """The handle of a lock that is ours now, None where another process has it."""
    with writing_to(lock.parent):
        while True:
            lock.parent.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(lock, _FLAGS, 0o666)
            except FileNotFoundError:
                continue  # its maker failed and took the folder away between the two calls
            try:
                if not _held(handle, lock, say):
                    os.close(handle)
                    return None
                if is_file_at(handle, lock):
                    os.ftruncate(handle, 0)
                    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # its owner took it away between the two calls


def _held(handle: int, lock: Path, say: Callable[[str], None]) -> bool:
    try:
        return locked(handle)
    except OSError as error:
        say(
            f"{lock.parent} cannot be locked ({error.strerror}): see to it that nothing else "
            "writes there"
        )
        return True


def _owner(lock: Path) -> str:
    with suppress(OSError, ValueError):
        if text := lock.read_text().strip():
            return text
    return "another process"
