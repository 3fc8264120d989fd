"""Who did what with which image: one JSON object a line, for hospitals that must be able to say so.

Nothing of the image but the hash of its voxels and its size, no coordinates, nothing that a viewer
sent as text. A line is on the disk before its answer is sent; while lines cannot be written,
nothing else is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import logging
import os
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from .refusal import NotServedError

AUDITED = {
    "/claim": "claim",
    "/release": "release",
    "/set_image": "set_image",
    "/reset_interactions": "reset",
    "/undo": "undo",
    "/predict": "predict",
    "/add_point_interaction": "point",
    "/add_bbox_interaction": "box",
    "/add_scribble_interaction": "scribble",
    "/add_lasso_interaction": "lasso",
    "/add_initial_seg_interaction": "mask",
    "/study/open": "set_image",
    "/study/mark": "mark",
    "/study/undo": "undo",
    "/study/clear": "reset",
    "/study/masks": "mask",
    "/study/save": "save",
}
"""Path of a request → what it does; others change nothing and are not written down."""
_LEAST_FREE = 64 * 1024
"""Bytes of the log's disk, for the lines of answers that are being made."""
_LONGEST = 200
"""Letters of a name or address that a proxy hands over."""
_LOG = logging.getLogger(__name__)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class AuditRules:
    """How requests are written down.

    Attributes:
        file: grows at its end, and is opened anew once it was moved away; made for its owner alone.
        model: what answers: its name and the hash of its weights or graphs.
        proxies: whose word on the user and the address is taken.
        is_required: refuse what cannot be written down; else it is only said in the server's log.
    """

    file: Path
    model: Mapping[str, str] = field(default_factory=dict)
    proxies: tuple[Network, ...] = ()
    is_required: bool = True


@dataclass(frozen=True)
class Caller:
    """Whom a request comes from: a name, "" where there is none, and an address."""

    name: str
    address: str


class AuditLog:
    """Appends to the file; for several threads.

    Args:
        rules: see `AuditRules`.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, rules: AuditRules) -> None:
        self.rules, self._lock = rules, threading.Lock()
        self._handle, self._is_torn, self._late = -1, False, list[bytes]()
        try:
            self._append(_line({"what": "start", **rules.model}))
        except OSError as error:
            raise InputError(
                f"the audit log {rules.file} cannot be written: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Write down that the server ends."""
        with self._lock, contextlib.suppress(OSError):
            self._append(_line({"what": "stop"}))
        with self._lock:
            self._drop()

    def caller(self, peer: str, headers: Mapping[str, str], key_name: str) -> Caller:
        """Who asks.

        Args:
            peer: address of the connection's other end.
            headers: of the request.
            key_name: of the key that it named.
        """
        if not _is_in(peer, self.rules.proxies):
            return Caller(key_name, peer)
        name = headers.get("x-forwarded-user", "").strip()[:_LONGEST]
        last = headers.get("x-forwarded-for", "").rpartition(",")[2].strip()[:_LONGEST]
        return Caller(name or key_name, last or peer)

    def check(self) -> None:
        """Whether there is room for a line, before anything is done.

        Raises:
            NotServedError: 507, there is none, and none may be missing.
        """
        with self._lock:
            try:
                self._catch_up()
                disk = os.statvfs(self.rules.file)
                if disk.f_bavail * disk.f_frsize < _LEAST_FREE:
                    raise OSError(0, "its disk is full")
            except OSError as error:
                self._say(error)
                if self.rules.is_required:
                    raise NotServedError(
                        507, "the audit log cannot be written: nothing is done"
                    ) from error

    def write(self, caller: Caller, **entry: Any) -> None:
        """Add a line; one that cannot be written is kept, and the next `check` tries again."""
        line = _line({"who": caller.name, "from": caller.address, **entry, **self.rules.model})
        with self._lock:
            self._late.append(line)
            try:
                self._catch_up()
            except OSError as error:
                self._say(error)
                if not self.rules.is_required:
                    self._late.clear()

    def _say(self, error: OSError) -> None:
        _LOG.error(
            "the audit log cannot be written (%s): %s",
            error.strerror,
            "all is refused until it can" if self.rules.is_required else "it is incomplete",
        )

    def _catch_up(self) -> None:
        while self._late:
            self._append(self._late[0])
            del self._late[0]

    def _append(self, line: bytes) -> None:
        """One line, through to the disk; after a torn one it begins on a line of its own."""
        self._open()
        line = b"\n" + line if self._is_torn else line
        written = 0
        try:
            while written < len(line):
                written += os.write(self._handle, line[written:])
            os.fsync(self._handle)
        except OSError:
            self._is_torn |= written > 0
            raise
        self._is_torn = False

    def _open(self) -> None:
        """Open the file, unless it is the one that is open."""
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self.rules.file, follow_symlinks=False)
            if self._handle >= 0 and os.path.samestat(found, os.fstat(self._handle)):
                return
        self._drop()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(self.rules.file, flags | getattr(os, "O_NONBLOCK", 0), 0o600)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(0, "it is no regular file")
        self._handle = handle
        self._is_torn = _ends_torn(handle, self.rules.file)

    def _drop(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1


def image_hash(voxels: npt.NDArray[Any]) -> str:
    """Of an image's values in C order, so that a line can be told to be of an image at hand."""
    content = np.ascontiguousarray(voxels).data.cast("B") if voxels.size else b""
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def read_networks(texts: list[str]) -> tuple[Network, ...]:
    """Addresses and networks, such as 10.0.0.7 and 10.1.0.0/16.

    Raises:
        InputError: one is neither.
    """
    try:
        return tuple(ipaddress.ip_network(text) for text in texts)
    except ValueError as error:
        raise InputError(f"--trust-proxy: {error}; expected an address or a network") from error


def _is_in(address: str, networks: tuple[Network, ...]) -> bool:
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_address(address)
        return any(found in network for network in networks)
    return False


def _line(entry: Mapping[str, Any]) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"time": now, **entry}).encode() + b"\n"


def _ends_torn(handle: int, path: Path) -> bool:
    """Whether the file's last line was cut off, by a full disk or a crash."""
    if os.fstat(handle).st_size == 0:
        return False
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) != b"\n"


def session_name(token: str) -> str:
    """What tells a slot's lines from others, without being the token itself."""
    return hashlib.blake2b(token.encode("utf-8", "replace"), digest_size=6).hexdigest()
