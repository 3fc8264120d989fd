"""Who changes which objects of a session: calls on one object wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from ..core.errors import InputError


class Claims:
    """Objects that calls are changing; a call takes all of its objects at once."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._held: list[tuple[frozenset[int] | None, int]] = []  # objects (None: all), thread

    @contextmanager
    def held(self, labels: Collection[int] | None) -> Iterator[None]:
        """Nobody else changes these objects meanwhile.

        Args:
            labels: None for all objects.

        Raises:
            InputError: this thread is changing one of them, in the call that it comes from.
        """
        claim = (None if labels is None else frozenset(labels), threading.get_ident())
        with self._change:
            while rivals := [one for one in self._held if _meet(claim[0], one[0])]:
                if any(thread == claim[1] for _, thread in rivals):
                    raise InputError(
                        "an object cannot be changed by what is told of its own change: end that "
                        "call first"
                    )
                self._change.wait()
            self._held.append(claim)
        try:
            yield
        finally:
            with self._change:
                self._held.remove(claim)
                self._change.notify_all()


def _meet(one: frozenset[int] | None, other: frozenset[int] | None) -> bool:
    return one is None or other is None or bool(one & other)
