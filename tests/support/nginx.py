"""The configurations of deployment/nginx/ in the real nginx, with the places of a test."""

from __future__ import annotations

import base64
import http.client
import os
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.ports import free_port, wait_for

CONFIG = Path(__file__).resolve().parents[2] / "deployment" / "nginx" / "nginx.conf"
VIEWER_CONFIG = CONFIG.with_name("viewer.conf")
USER, PASSWORD = "radiology", "correct horse"
LOGIN = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@dataclass(frozen=True)
class Proxy:
    """A running nginx."""

    port: int
    certificate: Path
    folder: Path

    def connect(self) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=str(self.certificate))
        return http.client.HTTPSConnection("localhost", self.port, context=context, timeout=20)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> int:
        connection = self.connect()
        try:
            connection.request(method, path, body, headers)
            return connection.getresponse().status
        finally:
            connection.close()


def write_secrets(folder: Path) -> None:
    """A key, a certificate of it, and a login, as docs/how-to/deploy.md makes them."""
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += " -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    command += " -keyout tls.key -out tls.crt"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    hashed = subprocess.run(
        ["openssl", "passwd", "-6", PASSWORD], check=True, capture_output=True, text=True
    ).stdout
    (folder / "htpasswd").write_text(f"{USER}:{hashed}")


def configured(folder: Path, port: int, changes: dict[str, str], shipped: Path = CONFIG) -> str:
    """The shipped configuration with the places of this test; everything else is as it is."""
    text = shipped.read_text()
    replaced = {
        **changes,
        "/tmp/": f"{folder}/",  # noqa: S108 - what the container has
        "/etc/dbsam/": f"{folder}/",
        "/dev/stdout": f"{folder}/access.log",
        "/dev/stderr": f"{folder}/error.log",
        "listen 8443": f"listen 127.0.0.1:{port}",
        "worker_processes auto": "worker_processes 1",
    }
    for old in replaced:
        assert old in text, f"{old!r} is not in {shipped.name} any more"
    parts = [text]
    for old, new in replaced.items():  # what was put in is not looked at again
        parts = [
            piece
            for part in parts
            for piece in ([part] if part in replaced.values() else _cut(part, old, new))
        ]
    return "".join(parts)


def _cut(part: str, old: str, new: str) -> list[str]:
    pieces: list[str] = []
    for piece in part.split(old):
        pieces += [new, piece]
    return pieces[1:]


@contextmanager
def running(
    nginx: str, folder: Path, changes: dict[str, str], shipped: Path = CONFIG
) -> Iterator[Proxy]:
    """nginx with the shipped configuration, until it answers and then some."""
    write_secrets(folder)
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(configured(folder, port, changes, shipped))
    user = "user root;" if os.getuid() == 0 else ""  # who may read pytest's folders
    log = folder / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [nginx, "-p", str(folder), "-c", str(config), "-g", f"daemon off; {user}"],
            stderr=stderr,
        )
    try:
        wait_for(port, process, log)
        yield Proxy(port, folder / "tls.crt", folder)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=10)


@contextmanager
def listener() -> Iterator[tuple[str, list[bytes]]]:
    """A server that keeps what it gets, up to the end of the first request's header."""
    got: list[bytes] = []

    def listen() -> None:
        with server.accept()[0] as connection:
            connection.settimeout(10)
            while b"\r\n\r\n" not in b"".join(got):
                got.append(connection.recv(1 << 16))
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=listen)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", got
        thread.join(timeout=10)
