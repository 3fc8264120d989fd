"""Who may use a predictor: threads one after another, and work ahead only while nobody waits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """A lock that a thread may take again, with a second, lower rank for work that nobody awaits.

    `with turns:` is a prompt's turn. Python's locks are not fair: without ranks, a thread that
    encodes slice after slice would keep out a prompt for as long as it likes.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._change = threading.Condition()
        self._wanted = 0

    def __enter__(self) -> None:
        self._want(1)
        try:
            self._lock.acquire()
        except BaseException:  # Ctrl-C
            self._want(-1)
            raise

    def __exit__(self, *exception: object) -> None:
        self._lock.release()
        self._want(-1)

    @contextlib.contextmanager
    def spare(self) -> Iterator[None]:
        """A turn once no thread has or awaits one; a prompt that comes later waits for its end."""
        with self._change:
            self._change.wait_for(lambda: self._wanted == 0)
        with self._lock:
            yield

    def _want(self, count: int) -> None:
        with self._change:
            self._wanted += count
            self._change.notify_all()
