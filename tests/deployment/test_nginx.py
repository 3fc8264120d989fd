"""deployment/nginx/nginx.conf in the real nginx, in front of the real server."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.traffic import masks_over_grpc, masks_over_http

from dbsam_deploy.clients.access import Access
from dbsam_deploy.clients.async_client import AsyncDbsamClient
from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.core.errors import InputError, ServingError

CONFIG = Path(__file__).resolve().parents[2] / "deployment" / "nginx" / "nginx.conf"
USER, PASSWORD = "radiology", "correct horse"
LOGIN = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
BOX = np.array([[2, 3, 30, 25]], np.float32)
BODY_LIMIT = 1 << 20


def image() -> np.ndarray:
    return np.random.default_rng().integers(0, 256, (40, 33, 3), dtype=np.uint8)


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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


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


def configured(folder: Path, port: int, changes: dict[str, str]) -> str:
    """The shipped configuration with the places of this test; everything else is as it is."""
    text = CONFIG.read_text()
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
        assert old in text, f"{old!r} is not in {CONFIG.name} any more"
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
def running(nginx: str, folder: Path, changes: dict[str, str]) -> Iterator[Proxy]:
    """nginx with the shipped configuration, until it answers and then some."""
    write_secrets(folder)
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(configured(folder, port, changes))
    user = "user root;" if os.getuid() == 0 else ""  # who may read pytest's folders
    process = subprocess.Popen(
        [nginx, "-p", str(folder), "-c", str(config), "-g", f"daemon off; {user}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    pytest.fail(f"nginx did not come up: {process.communicate()[1]}")
                time.sleep(0.02)
        yield Proxy(port, folder / "tls.crt", folder)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)


@pytest.fixture(scope="module")
def proxy(
    triton, deployment_tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """nginx in front of the session's server."""
    changes = {
        "server:8000": triton.http_url,
        "server:8001": triton.grpc_url,
        "client_max_body_size 200m": f"client_max_body_size {BODY_LIMIT}",
    }
    with running(deployment_tool("nginx"), tmp_path_factory.mktemp("nginx"), changes) as started:
        yield started


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


def test_what_reaches_the_server_has_a_length_and_no_secret(deployment_tool, tmp_path):
    with listener() as (address, got):
        changes = {"server:8000": address, "server:8001": address}
        with running(deployment_tool("nginx"), tmp_path, changes) as proxy:
            connection = proxy.connect()
            status, _ = chunked(connection, b"x" * 5000, {"dbsam-key": "5ecret"})
            connection.close()
    assert status == 200
    head = b"".join(got).partition(b"\r\n\r\n")[0].decode().lower()
    assert "content-length: 5000" in head
    assert "transfer-encoding" not in head
    for secret in ("authorization", "5ecret", "dbsam-key"):
        assert secret not in head


def test_certificates_of_clients_in_the_place_of_passwords(deployment_tool, tmp_path):
    """The lines that stand in the configuration as a comment."""
    with listener() as (address, got):
        changes = {
            "# ssl_client_certificate /etc/dbsam/clients-ca.crt": (
                f"ssl_client_certificate {tmp_path}/tls.crt"  # which signs itself
            ),
            "# ssl_verify_client": "ssl_verify_client",
            'auth_basic "dbsam"': "auth_basic off",
            "server:8000": address,
            "server:8001": address,
        }
        with running(deployment_tool("nginx"), tmp_path, changes) as proxy:
            assert proxy.ask("GET", "/v2/health/ready", Authorization=LOGIN) == 400
            assert got == [], "nobody came through"
            context = ssl.create_default_context(cafile=str(proxy.certificate))
            context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
            connection = http.client.HTTPSConnection("localhost", proxy.port, context=context)
            connection.request("GET", "/v2/health/ready")
            assert connection.getresponse().status == 200
            connection.close()
    assert b"GET /v2/health/ready" in b"".join(got)


def expected(triton, picture: np.ndarray) -> np.ndarray:
    with DbsamClient(triton.grpc_url) as client:
        return client.segment(picture, BOX).masks[:, 0]


def test_right_masks_over_both_protocols_with_the_right_login(proxy, triton):
    picture = image()
    wanted = expected(triton, picture)
    for ask in (masks_over_http, masks_over_grpc):
        masks = ask(f"localhost:{proxy.port}", picture, BOX, proxy.certificate, LOGIN)
        np.testing.assert_array_equal(masks, wanted)


@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_the_librarys_own_clients_come_through(proxy, triton, transport):
    picture, url = image(), f"localhost:{proxy.port}"
    access = Access(ca=proxy.certificate, login=f"{USER}:{PASSWORD}")
    wanted = expected(triton, picture)
    with DbsamClient(url, transport, access=access) as client:
        np.testing.assert_array_equal(client.segment(picture, BOX, logits=True).masks[:, 0], wanted)
        opened = client.open(picture)
        np.testing.assert_array_equal(opened.predict(boxes=BOX).masks[:, 0], wanted)

    async def ask() -> np.ndarray:
        async with AsyncDbsamClient(url, transport, access=access) as client:
            return (await client.segment(picture, BOX)).masks[:, 0]

    np.testing.assert_array_equal(asyncio.run(ask()), wanted)
    wrong = Access(ca=proxy.certificate, login=f"{USER}:wrong")
    with (
        DbsamClient(url, transport, access=wrong) as client,
        pytest.raises(InputError, match="does not know this login"),
    ):
        client.segment(picture, BOX)
    with (
        DbsamClient(url, transport, access=access) as client,
        pytest.raises(InputError, match="larger than the proxy"),
    ):
        client.segment(np.random.default_rng().integers(0, 256, (700, 700, 3), np.uint8), BOX)
    with (
        DbsamClient(url, transport, access=Access(), timeout_s=5) as client,
        pytest.raises(ServingError, match="no Triton server answers"),
    ):
        client.segment(picture, BOX)  # an authority that nobody knows


@pytest.mark.parametrize(
    "login", [None, "Basic " + base64.b64encode(b"radiology:wrong").decode(), "Bearer abc"]
)
def test_another_login_is_refused(proxy, login):
    headers = {"Authorization": login} if login else {}
    assert proxy.ask("GET", "/v2", **headers) == 401
    assert proxy.ask("POST", "/v2/models/dbsam/infer", b"{}", **headers) == 401
    with pytest.raises(Exception, match="UNAUTHENTICATED"):
        masks_over_grpc(f"localhost:{proxy.port}", image(), BOX, proxy.certificate, login)


def test_plain_http_is_refused(proxy):
    connection = http.client.HTTPConnection("localhost", proxy.port, timeout=10)
    connection.request("GET", "/v2", headers={"Authorization": LOGIN})
    assert connection.getresponse().status == 400
    connection.close()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/models/stats"),
        ("GET", "/v2/models/dbsam/stats"),
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/dbsam/unload"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("POST", "/v2/logging"),
        ("POST", "/v2/trace/setting"),
        ("POST", "/v2/models/dbsam_decoder/infer"),
        ("POST", "/v2/models/dbsam/../dbsam_decoder/infer"),
        ("POST", "/v2//models/dbsam_decoder/infer"),
        ("POST", "/v2/models/%64bsam_decoder/infer"),
        ("GET", "/metrics"),
        ("POST", "/inference.GRPCInferenceService/RepositoryModelUnload"),
        ("POST", "/inference.GRPCInferenceService/SystemSharedMemoryStatus"),
    ],
)
def test_nothing_but_inference_has_a_way_through(proxy, method, path):
    assert proxy.ask(method, path, b"" if method == "POST" else None, Authorization=LOGIN) == 404


def test_a_body_that_is_too_large_is_refused(proxy):
    body = bytes(BODY_LIMIT + 1)
    assert proxy.ask("POST", "/v2/models/dbsam/infer", body, Authorization=LOGIN) == 413
    large = np.zeros((700, 700, 3), np.uint8)
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED"):
        masks_over_grpc(f"localhost:{proxy.port}", large, BOX, proxy.certificate, LOGIN)


def chunked(
    connection: http.client.HTTPSConnection, body: bytes, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """Send a body in chunks of one byte."""
    connection.putrequest("POST", "/v2/models/dbsam/infer")
    headers = {"Authorization": LOGIN, "Transfer-Encoding": "chunked", **(headers or {})}
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    connection.sock.sendall(chunks)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_a_body_of_chunks_reaches_the_server_in_one_piece(proxy, triton):
    """The server of 24.10 ends on 600,000 chunks of one byte."""
    connection = proxy.connect()
    status, answer = chunked(connection, b" " * 600_000 + b"{}")
    assert status in (400, 500), answer  # the server's, by its release
    assert b"Unable to parse 'inputs'" in answer
    connection.close()
    picture = image()
    request = {
        "inputs": [
            {"name": "raw_image", "shape": picture.shape, "datatype": "UINT8", "data": []},
            {"name": "boxes", "shape": [1, 4], "datatype": "FP32", "data": BOX.ravel().tolist()},
        ],
        "outputs": [{"name": "masks"}],
    }
    request["inputs"][0]["data"] = picture.ravel().tolist()
    status, answer = chunked(proxy.connect(), json.dumps(request).encode())
    assert status == 200, answer
    masks = np.array(json.loads(answer)["outputs"][0]["data"], np.uint8).reshape(1, 40, 33)
    np.testing.assert_array_equal(masks, expected(triton, picture))
    triton.check()


def test_neither_passwords_nor_queries_stand_in_the_log(proxy):
    proxy.ask("GET", "/v2/health/ready?key=5ecret", Authorization=LOGIN)
    deadline = time.monotonic() + 5  # nginx writes a line once the answer is out
    log = ""
    while "/v2/health/ready 200" not in log and time.monotonic() < deadline:
        time.sleep(0.02)
        log = (proxy.folder / "access.log").read_text()
    assert "/v2/health/ready 200" in log
    assert "radiology" in log, "who asked"
    for secret in ("5ecret", PASSWORD, LOGIN):
        assert secret not in log + (proxy.folder / "error.log").read_text()


def test_a_client_that_asks_too_often_is_told_so(proxy):
    connection = proxy.connect()
    answers = []
    for _ in range(200):
        connection.request("GET", "/v2/health/live", headers={"Authorization": LOGIN})
        answer = connection.getresponse()
        answer.read()
        answers.append(answer.status)
        if answer.status == 429:
            break
    connection.close()
    assert answers[-1] == 429
    assert set(answers[:-1]) == {200}


def test_the_metrics_are_not_behind_the_proxy(triton):
    """They are on a port of their own, which nginx does not know."""
    with urllib.request.urlopen(f"http://{triton.metrics_url}/metrics", timeout=10) as page:
        assert b"nv_inference_count" in page.read()
    assert str(triton.ports.metrics) not in CONFIG.read_text()
    assert "8002" not in CONFIG.read_text()
