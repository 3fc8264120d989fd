"""Limits of time that a server which sends a byte now and then cannot stretch.

The timeout of a socket begins anew with each byte. Here every read of an answer, of its headers as
well, looks at a clock that begins with the request.
"""

from __future__ import annotations

import io
import time
from http.client import HTTPResponse
from typing import Any

from ..core.errors import PacsError
from ..extras import require

SILENCE_S = 30.0
"""Longest silence of a server."""
GRACE_S = 60.0
"""An exchange may take so long, whatever its size."""
SLOWEST = 32 * 1024
"""Bytes a second that further time is given for."""


class Patience:
    """How long an exchange with a PACS may take, and all of them together.

    Args:
        total_s: for all exchanges.
    """

    def __init__(self, total_s: float) -> None:
        self._total_s, self._end = total_s, time.monotonic() + total_s
        self._place, self._start, self._bytes = "", 0.0, 0

    def begin(self, place: str) -> None:
        """An exchange begins; `place` is named in errors."""
        self._place, self._start, self._bytes = place, time.monotonic(), 0
        self.left_s()

    def note(self, count: int) -> None:
        """So many bytes went either way."""
        self._bytes += count

    def left_s(self) -> float:
        """Seconds that may be waited for the next bytes.

        Raises:
            PacsError: there are none.
        """
        now = time.monotonic()
        if now >= self._end:
            raise PacsError(f"{self._place}: not done within {self._total_s:g} s in all: given up")
        allowed = GRACE_S + self._bytes / SLOWEST
        if now >= self._start + allowed:
            raise PacsError(
                f"{self._place}: {self._bytes} bytes in {now - self._start:.0f} s, slower than "
                f"{SLOWEST // 1024} KiB a second: given up"
            )
        return min(SILENCE_S, self._start + allowed - now, self._end - now)


class _Hurried(io.RawIOBase):
    """What comes through a socket while there is patience."""

    def __init__(self, raw: Any, sock: Any, patience: Patience) -> None:
        self._raw, self._sock, self._patience = raw, sock, patience

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._patience.left_s())
        try:
            count = int(self._raw.readinto(buffer))
        except TimeoutError:
            self._patience.left_s()  # says why, unless it was silence
            raise
        self._patience.note(count)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def patient_adapter(patience: Patience) -> Any:
    """An adapter of requests whose connections have this patience.

    Raises:
        MissingError: requests is not installed.
    """
    pools, adapters = (
        require(name, extra="pacs", what_for="a PACS")
        for name in ("urllib3.connectionpool", "requests.adapters")
    )

    class Answer(HTTPResponse):
        def __init__(self, sock: Any, *words: Any, **options: Any) -> None:
            super().__init__(sock, *words, **options)
            self.fp = io.BufferedReader(_Hurried(self.fp.detach(), sock, patience))

    def patient(pool: Any) -> Any:
        class Connection(pool.ConnectionCls):
            response_class = Answer

            def send(self, data: Any) -> None:
                patience.left_s()
                super().send(data)
                patience.note(len(data) if isinstance(data, bytes) else 0)

        return type(pool.__name__, (pool,), {"ConnectionCls": Connection})

    adapter = adapters.HTTPAdapter()
    adapter.poolmanager.pool_classes_by_scheme = {
        "http": patient(pools.HTTPConnectionPool),
        "https": patient(pools.HTTPSConnectionPool),
    }
    return adapter
