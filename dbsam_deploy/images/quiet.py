"""Libraries in C that print on stderr what their caller says in one line anyway."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

_LOCK = threading.RLock()  # two at once would each restore what the other one set


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """Nothing that C code of this process prints on stderr gets there."""
    with _LOCK:
        kept = os.dup(2)
        try:
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
