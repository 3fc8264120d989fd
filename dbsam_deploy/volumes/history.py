"""Changes of a session that can be taken back."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from ..core.errors import InputError
from .objects import Change, TrackedObject, Undo

UNDO_BYTES = 64 * 1024 * 1024
"""What a session keeps to take changes back; the oldest goes first."""


class History:
    """Changes with what takes them back, the last one first, within a number of bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._steps: deque[tuple[Change, tuple[Undo, ...], int]] = deque()

    def add(
        self, change: Change, records: Sequence[Undo], objects: Mapping[int, TrackedObject]
    ) -> None:
        """Keep a change of these objects; the oldest go."""
        cost = sum(one.bytes_beside(objects[one.label].slices) for one in records)
        self._steps.append((change, tuple(records), cost))
        while len(self._steps) > 1 and sum(c for *_, c in self._steps) > self._most_bytes:
            self._steps.popleft()

    def pop(self) -> tuple[Change, tuple[Undo, ...]]:
        """The last change.

        Raises:
            InputError: none is kept.
        """
        if not self._steps:
            raise InputError("nothing to undo: no change is kept")
        change, records, _ = self._steps.pop()
        return change, records
