"""Image embeddings kept between requests, the least recently used one dropped first.

Those that nobody announced to come back to (one-shot requests, health checks) take a quarter of the
memory at most once it is full, so that they do not push out images that somebody works on.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_POLL_S = 0.1
_ONCE_PART = 4
"""One in so many bytes of a full cache is for embeddings of one-shot requests."""


@dataclass(frozen=True, eq=False)
class Kept:
    """The embedding of one image.

    Attributes:
        embedding: whatever the decoder takes; it stays on the device where the encoder left it.
        original_size: height and width of the image.
        nbytes: its size in bytes.
    """

    embedding: Any
    original_size: tuple[int, int]
    nbytes: int


@dataclass
class CacheCounts:
    """What happened so far; `images` and `nbytes` are what is kept now."""

    hits: int = 0
    misses: int = 0
    joined: int = 0
    evictions: int = 0
    images: int = 0
    nbytes: int = 0


@dataclass(eq=False)
class _Flight:
    """An embedding that one thread computes and others may wait for."""

    landed: threading.Event = field(default_factory=threading.Event)
    kept: Kept | None = None
    error: BaseException | None = None


class EmbeddingCache:
    """Embeddings by image id, at most `budget` bytes of them; safe to use from several threads.

    Args:
        budget: bytes; 0 keeps none. One that is larger than the budget is used and not kept.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._lasting: OrderedDict[str, Kept] = OrderedDict()
        self._once: OrderedDict[str, Kept] = OrderedDict()
        self._flights: dict[str, _Flight] = {}
        self._lock = threading.Lock()
        self.counts = CacheCounts()

    def get(self, image_id: str) -> Kept | None:
        """The embedding, if it is kept; it then is the most recently used one."""
        with self._lock:
            return self._find(image_id, lasting=True)

    def _find(self, image_id: str, *, lasting: bool) -> Kept | None:
        shelf = self._once if image_id in self._once else self._lasting
        kept = shelf.pop(image_id, None)
        if kept is not None:
            (self._lasting if lasting else shelf)[image_id] = kept
            self.counts.hits += 1
        return kept

    def get_or_make(
        self,
        image_id: str,
        make: Callable[[], Kept],
        check: Callable[[], None],
        *,
        lasting: bool = True,
    ) -> tuple[Kept, bool]:
        """The embedding, computed if need be: once, however many threads ask at the same time.

        Args:
            image_id: whose embedding.
            make: computes it; what it raises, every thread that waits for it gets too.
            check: called while another thread computes; raises when waiting has no use any more.
            lasting: whether somebody means to come back to this image.

        Returns:
            The embedding, and whether it was kept already.
        """
        with self._lock:
            kept = self._find(image_id, lasting=lasting)
            if kept is not None:
                return kept, True
            flight = self._flights.get(image_id)
            if mine := flight is None:
                flight = self._flights[image_id] = _Flight()
                self.counts.misses += 1
            else:
                self.counts.joined += 1
        if mine:
            self._fly(image_id, flight, make, self._lasting if lasting else self._once)
        else:
            while not flight.landed.wait(_POLL_S):
                check()
        if flight.error is not None:
            raise flight.error
        if flight.kept is None:
            raise RuntimeError("an embedding landed without a value")
        return flight.kept, False

    def _fly(
        self, image_id: str, flight: _Flight, make: Callable[[], Kept], shelf: dict[str, Kept]
    ) -> None:
        try:
            flight.kept = make()
        except BaseException as error:
            flight.error = error
        with self._lock:
            del self._flights[image_id]
            if flight.kept is not None:
                self._keep(image_id, flight.kept, shelf)
        flight.landed.set()

    def _keep(self, image_id: str, kept: Kept, shelf: dict[str, Kept]) -> None:
        if kept.nbytes > self._budget:
            return
        shelf[image_id] = kept
        self.counts.nbytes += kept.nbytes
        while self.counts.nbytes > self._budget:
            once = sum(item.nbytes for item in self._once.values())
            full = not self._lasting or once > self._budget // _ONCE_PART
            _, oldest = (self._once if full else self._lasting).popitem(last=False)
            self.counts.nbytes -= oldest.nbytes
            self.counts.evictions += 1
        self.counts.images = len(self._once) + len(self._lasting)
