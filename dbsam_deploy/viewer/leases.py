"""Who may use the server: a few viewers at a time, each until it goes, stands idle or dies."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from .refusal import NotServedError
from .workspace import Workspace


@dataclass(frozen=True)
class LeaseRules:
    """How long a viewer keeps its slot.

    Attributes:
        slots: viewers at a time.
        idle_s: without a mark or image.
        liveness_s: without any sign; clients send heartbeats.
        upload_s: without another byte of a body that was begun.
        image_bytes: of images and bodies in memory, of all viewers together.
    """

    slots: int = 3
    idle_s: float = 600.0
    liveness_s: float = 60.0
    upload_s: float = 60.0
    image_bytes: int = 4 * 1024**3


class Closable(Protocol):
    """What a slot holds, and lets go of at its end."""

    def close(self) -> None:
        """Free it."""
        ...


@dataclass(frozen=True)
class SeenImage:
    """What is written down of an image: a hash of its voxels, and how many along each axis."""

    hash: str
    shape: tuple[int, ...]


@dataclass(eq=False)
class Lease:
    """One viewer's slot.

    Attributes:
        token: known to the viewer alone.
        work: its image and object.
        acted: when it last did something.
        seen: when it last gave a sign.
        in_flight: requests that are being answered.
        held_bytes: of its image and of bodies that come in.
        is_over: it was given back.
        turn: its requests wait for each other.
        study: what our own page works on instead of `work`; None for other viewers.
        image: of an audited server, once it has one.
    """

    token: str
    work: Workspace
    acted: float
    seen: float
    in_flight: int = 0
    held_bytes: int = 0
    is_over: bool = False
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    study: Closable | None = None
    image: SeenImage | None = None

    def close(self) -> None:
        """Let go of everything."""
        self.work.close()
        if self.study is not None:
            self.study.close()
        self.study = None


class Leases:
    """All slots of a server; for one event loop.

    Args:
        rules: see `LeaseRules`.
        open_workspace: makes what a new viewer works on.
        clock: seconds.
    """

    def __init__(
        self,
        rules: LeaseRules,
        open_workspace: Callable[[], Workspace],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rules, self._open, self._clock = rules, open_workspace, clock
        self._held: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self._held)

    def claim(self) -> Lease:
        """A new slot.

        Raises:
            NotServedError: 503, all are taken.
        """
        self.sweep()
        if len(self._held) >= self.rules.slots:
            text = f"all {self.rules.slots} slots are taken: close a viewer, or try again later"
            raise NotServedError(503, text)
        now = self._clock()
        lease = Lease(secrets.token_hex(16), self._open(), now, now)
        self._held[lease.token] = lease
        return lease

    def find(self, token: str | None) -> Lease:
        """A viewer's slot.

        Raises:
            NotServedError: 410, there is none any more.
        """
        self.sweep()
        if token is None:
            raise NotServedError(410, "lease token missing")
        if token not in self._held:
            raise NotServedError(410, "lease expired or unknown")
        return self._held[token]

    def release(self, token: str | None) -> Lease | None:
        """Give a slot back, if it is still held, and return it."""
        lease = None if token is None else self._held.get(token)
        if lease is not None:
            self._end(lease)
        return lease

    def sweep(self) -> None:
        """Take slots back that nobody uses, none with a request in flight."""
        now = self._clock()
        for lease in list(self._held.values()):
            is_idle = now - lease.acted > self.rules.idle_s
            is_dead = 0 < self.rules.liveness_s < now - lease.seen
            if not lease.in_flight and (is_idle or is_dead):
                self._end(lease)

    def remaining_s(self, lease: Lease) -> float:
        """Until it counts as idle."""
        return max(0.0, self.rules.idle_s - (self._clock() - lease.acted))

    def see(self, lease: Lease) -> None:
        """Note a sign of life."""
        lease.seen = self._clock()

    @contextlib.asynccontextmanager
    async def acting(self, lease: Lease) -> AsyncIterator[Workspace]:
        """A viewer's turn: it counts as seen and busy from its begin to its end."""
        lease.in_flight += 1
        try:
            async with lease.turn:
                if lease.is_over:
                    raise NotServedError(410, "lease was given back")
                yield lease.work
        finally:
            lease.in_flight -= 1
            lease.acted = lease.seen = self._clock()
            if lease.is_over and not lease.in_flight:
                lease.close()

    @contextlib.contextmanager
    def room(self, lease: Lease) -> Iterator[Callable[[int], None]]:
        """What counts the bytes of a request, which are free again at its end.

        What it yields is called with the number of bytes, and raises `NotServedError` (413) where
        all viewers together would have more than `LeaseRules.image_bytes`.
        """
        own = 0

        def take(count: int) -> None:
            nonlocal own
            held = sum(one.held_bytes for one in self._held.values())
            if held + count > self.rules.image_bytes:
                raise NotServedError(
                    413, "the images of all viewers need more memory than is allowed"
                )
            own += count
            lease.held_bytes += count

        try:
            yield take
        finally:
            lease.held_bytes -= own

    def _end(self, lease: Lease) -> None:
        del self._held[lease.token]
        lease.is_over = True
        if not lease.in_flight:
            lease.close()
