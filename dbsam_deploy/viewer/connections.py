"""Where the viewer's server listens, and a connection of it."""

from __future__ import annotations

import os
import socket
from typing import Any

from ..core.errors import InputError


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which refuses connections until it listens.

    Args:
        host: name or address, IPv4 or IPv6.
        port: 0 for a free one.

    Raises:
        InputError: the port is taken, or the address is none of this machine's.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":  # elsewhere it would share the port with another server
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise InputError(
            f"cannot listen at {host}, port {port} ({error.strerror}): name another one with "
            "--port, or with --host an address of this machine"
        ) from error
    return bound


def quiet_protocol() -> type[Any]:
    """Protocol for uvicorn that ends quietly where a body is malformed after its answer has begun.

    uvicorn answers a malformed body with 400. An answer that was given before the body was read
    cannot be followed by a second one: h11 raises, and asyncio logs forty lines for each request.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Quiet(H11Protocol):
        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
            else:
                self.transport.close()

    return Quiet
