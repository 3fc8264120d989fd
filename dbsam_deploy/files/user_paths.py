"""Paths as people write them: the one place where `~` is expanded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..core.errors import InputError


def user_path(value: Any, what: str = "a path") -> Path:
    """A path that somebody wrote, with a leading `~` or `~name` expanded.

    A shell expands it only at the start of a word, so not in `--output=~/masks`.

    Args:
        value: text or a path.
        what: its name, for messages.

    Raises:
        InputError: neither text nor a path.
    """
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{what} is {value!r:.80}: expected text or a pathlib.Path")
    text = os.fspath(value)
    if not isinstance(text, str):
        raise InputError(f"{what} is {value!r:.80}: expected text, not bytes")
    return Path(os.path.expanduser(text))
