"""Who may ask, and that it is written down."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from .audit import AUDITED, AuditLog, image_hash, session_name
from .leases import Lease, SeenImage
from .refusal import NotServedError

if TYPE_CHECKING:  # an extra's, and only named here
    from fastapi import Request, Response


class Reception:
    """What every request passes through.

    Args:
        key: that a request must name, or the keys of several by name; None or none for all.
        audit: where acts are written down.
    """

    def __init__(self, key: str | Mapping[str, str] | None, audit: AuditLog | None) -> None:
        self._keys = {"": key} if isinstance(key, str) else dict(key or {})
        self._audit = audit

    def check_key(self, request: Request) -> None:
        """Let a request in that names a key.

        Raises:
            NotServedError: 401, it does not.
        """
        given = request.headers.get("authorization", "").encode("latin-1", "replace")
        pairs = [(name, f"Bearer {key}".encode()) for name, key in self._keys.items()]
        names = [name for name, wanted in pairs if hmac.compare_digest(given, wanted)]
        if self._keys and not names:
            raise NotServedError(401, "the key is missing or wrong")
        request.state.key_name = names[0] if names else ""

    async def check_log(self, path: str) -> None:
        """See to it that an act can be written down; errors as `AuditLog.check`."""
        if self._audit is not None and path in AUDITED:
            await asyncio.to_thread(self._audit.check)

    async def note(self, path: str, request: Request, response: Response, start: float) -> None:
        """Write an act down, unless its caller has shown none of the keys.

        Args:
            path: of the route.
            request: whose slot is `state.lease`, where it has one.
            response: its answer.
            start: of `time.perf_counter`.
        """
        key_name, audit = getattr(request.state, "key_name", None), self._audit
        if audit is None or path not in AUDITED or key_name is None:
            return
        lease: Lease | None = getattr(request.state, "lease", None)
        entry: dict[str, Any] = {"what": AUDITED[path], "session": None}
        if lease is not None:
            entry["session"] = session_name(lease.token)
            if lease.image is not None:
                entry |= {"image": lease.image.hash, "voxels": lease.image.shape}
        entry["status"] = response.status_code
        entry["ms"] = round(1000 * (time.perf_counter() - start), 1)
        peer = request.client.host if request.client else ""
        caller = audit.caller(peer, request.headers, key_name)
        await asyncio.to_thread(audit.write, caller, **entry)

    def seen(self, voxels: npt.NDArray[Any]) -> SeenImage | None:
        """What is written down of an image, (D, H, W); None where nothing is."""
        return None if self._audit is None else SeenImage(image_hash(voxels), voxels.shape)
