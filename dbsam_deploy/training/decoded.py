"""Decoded files that come up again: the last used ones, within a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

Key = TypeVar("Key", bound=Hashable)
ArrayGroup = tuple[npt.NDArray[np.generic], ...]


class RecentArrays(Generic[Key]):
    """Arrays by key; the last one is kept whatever it takes.

    Args:
        load: makes them.
        most_bytes: of all that are kept.
    """

    def __init__(self, load: Callable[[Key], ArrayGroup], most_bytes: int) -> None:
        self._load, self.most_bytes = load, most_bytes
        self._kept: OrderedDict[Key, ArrayGroup] = OrderedDict()

    @property
    def used(self) -> int:
        """Bytes of what is kept."""
        return sum(array.nbytes for arrays in self._kept.values() for array in arrays)

    def __call__(self, key: Key) -> ArrayGroup:
        """What is kept, or made now; errors are those of `load`."""
        if key not in self._kept:
            self._kept[key] = self._load(key)
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and self.used > self.most_bytes:
            self._kept.popitem(last=False)
        return self._kept[key]

    def clear(self) -> None:
        """Keep nothing."""
        self._kept.clear()
