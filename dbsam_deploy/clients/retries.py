"""How often and when a request is sent again, and how long it may take in all."""

from __future__ import annotations

import random
import time
import uuid
from dataclasses import dataclass, field
from typing import Literal

from ..core.errors import BusyError, DeadlineError, InputError, NoServerError, StoppingError

Transport = Literal["grpc", "http"]

_JITTER = 0.5
"""Share of a pause that is drawn, so that clients refused together do not come back together."""


@dataclass(frozen=True)
class Retries:
    """When a request that a server refused is sent again.

    Only a refusal that the server itself sent is answered so: "busy", "stopping" or a model that is
    being loaded. A server that is not there is an error at once, unless `lost_connection`.

    Attributes:
        attempts: how often a request is sent at most; 1 is once.
        first_s: the pause before the second attempt, in seconds; it doubles each time. A longer one
            that the server asks for is kept.
        longest_s: the longest such pause, in seconds.
        lost_connection: also send again where no server answers, or where the connection broke;
            for servers that are restarted. A request may then be computed twice.
    """

    attempts: int = 8
    first_s: float = 0.1
    longest_s: float = 5.0
    lost_connection: bool = False

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InputError(f"retries: {self.attempts} attempts: expected at least 1")
        if not 0 <= self.first_s <= self.longest_s < float("inf"):
            raise InputError(
                f"retries: first_s {self.first_s}, longest_s {self.longest_s}: expected seconds, "
                "the first not more than the longest"
            )

    def pause_s(self, sent: int, error: Exception) -> float | None:
        """Seconds to wait before the request is sent again; None if it is not.

        Args:
            sent: how often it was sent.
            error: how that ended.
        """
        again = isinstance(error, BusyError | StoppingError) or (
            self.lost_connection and isinstance(error, NoServerError)
        )
        if not again or sent >= self.attempts:
            return None
        pause = min(self.longest_s, self.first_s * 2 ** (sent - 1))
        drawn = random.uniform(0, _JITTER)  # noqa: S311 - no secret
        asked = error.retry_after_s if isinstance(error, BusyError) else None
        if asked is not None and asked > pause:
            return asked * (1 + drawn)  # not before the time that the server named
        return pause * (1 - drawn)


DEFAULT_RETRIES = Retries()


@dataclass(frozen=True)
class ServerRequest:
    """One request of a caller, however often it is sent.

    Attributes:
        url: host:port.
        transport: `grpc` or `http`.
        timeout_s: how long all of it may take.
        id: in the server's log and in this client's; twelve hexadecimal digits.
        ends: when its time is over, by `time.monotonic`.
    """

    url: str
    transport: Transport
    timeout_s: float
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    ends: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", time.monotonic() + self.timeout_s)

    def left_s(self) -> float:
        """Seconds that are left.

        Raises:
            DeadlineError: none.
        """
        left = self.ends - time.monotonic()
        if left <= 0:
            raise self.late()
        return left

    def late(self) -> DeadlineError:
        """What to raise when the time is over."""
        return DeadlineError(
            f"Triton on {self.url} did not answer in time (timeout_s {self.timeout_s:g}; "
            f"request {self.id})"
        )
