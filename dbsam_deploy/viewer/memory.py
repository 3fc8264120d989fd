"""What one viewer has marked so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..volumes.objects import SliceName
from .marks import Mark
from .slice_work import Wish


@dataclass(frozen=True)
class Memory:
    """What was marked so far; replaced, never written to.

    Attributes:
        queued: marks that wait for a prediction.
        wishes: what was said of each slice, (axis, index).
        decided: slices along each axis that no chain may change, by axis.
        flat: the slice of the last mark that named one.
        last: the slice that was decided last.
        sure: the model's estimate on the slice that was prompted last.
    """

    queued: tuple[Mark, ...] = ()
    wishes: Mapping[SliceName, Wish] = field(default_factory=dict)
    decided: Mapping[int, frozenset[int]] = field(default_factory=dict)
    flat: SliceName | None = None
    last: SliceName | None = None
    sure: float | None = None

    def with_decided(self, axis: int, index: int) -> Memory:
        """The same with one more slice that stays."""
        own = self.decided.get(axis, frozenset()) | {index}
        return replace(self, decided={**self.decided, axis: own}, last=(axis, index))
