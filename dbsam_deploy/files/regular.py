"""Only regular files are opened: a FIFO or a socket waits for ever, a device has no end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..core.errors import DbsamError, InputError

MAX_TEXT_BYTES = 16 * 1024 * 1024
"""Longest text file that is read: a recipe, or a list of cases."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def regular_size(path: Path, error: type[DbsamError] = InputError) -> int:
    """Bytes of a regular file, links followed; nothing is opened.

    Args:
        path: the file.
        error: what is raised.

    Raises:
        DbsamError: of the class `error`: no such file, or a folder, FIFO, socket or device.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as reason:
        raise error(f"{path}: no such file, or not readable: {reason}") from reason
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "a special file")
        raise error(f"{path} is {kind}: expected a regular file; copy its content into one")
    return status.st_size


def small_text(path: Path) -> str:
    """Content of a text file that a user wrote.

    Args:
        path: a regular file.

    Raises:
        InputError: see `regular_size`; more than `MAX_TEXT_BYTES`, or no text.
    """
    size = regular_size(path)
    if size > MAX_TEXT_BYTES:
        raise InputError(f"{path}: {size} bytes; at most {MAX_TEXT_BYTES} of a text are read")
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as reason:
        raise InputError(f"{path} is not a readable text file: {reason}") from reason
