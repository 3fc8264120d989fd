"""The server's three ports: which are taken, and free ones where 0 was asked for."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from ..core.errors import InputError
from .environment import ServerEnvironment

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Ports:
    """The server's three ports; 0 takes a free one."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    return host == "localhost" or host.startswith("127.")


def reserve(ports: Ports, host: str) -> Ports:
    """Check that each port is free and choose a free one where 0 was asked for.

    Raises:
        InputError: one is taken, or `host` is no address of this machine.
    """
    sockets, numbers = [], []
    wanted = (("http", ports.http), ("grpc", ports.grpc), ("metrics", ports.metrics))
    try:
        for option, port in wanted:
            listener = socket.socket()
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
            except (OSError, OverflowError) as error:
                raise InputError(
                    f"cannot listen on {host}:{port} ({error}): choose another with "
                    f"--{option}-port, or stop what uses it"
                ) from error
            numbers.append(listener.getsockname()[1])
    finally:
        for listener in sockets:
            listener.close()
    return Ports(*numbers)


def network_warning(host: str, environment: ServerEnvironment) -> str:
    """What is wrong with a server of the wheel that others reach, "" for one that nobody does."""
    if is_loopback(host) or environment.is_installation:
        return ""
    return (
        f"WARNING: this CPU server listens on {host}. It is Triton 2.51 (24.10), which a chunked "
        "HTTP body of many small chunks ends (fixed in later releases), and it asks nobody for a "
        "login: keep it on 127.0.0.1, or serve from the container (--docker)"
    )
