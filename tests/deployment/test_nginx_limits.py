"""The real nginx: slow clients end at it, and what it decides by certificate, rate or image."""

from __future__ import annotations

import csv
import re
import socket
import ssl
import subprocess
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from support.nginx import LOGIN, PASSWORD, USER, Proxy, listener, running
from support.scripted_server import scripted_server

from dbsam_deploy import loadtest
from dbsam_deploy.cli import run
from dbsam_deploy.clients.access import Access
from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.clients.retries import Retries
from dbsam_deploy.core.errors import BusyError, InputError, ServingError

BOX = np.array([[2, 3, 30, 25]], np.float32)
SIZING = Path(__file__).resolve().parents[2] / "docs" / "sizing.md"
ONCE = Retries(attempts=1)


def image() -> np.ndarray:
    return np.random.default_rng().integers(0, 256, (40, 33, 3), dtype=np.uint8)


def tls(proxy: Proxy) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(proxy.certificate))
    raw = socket.create_connection(("localhost", proxy.port), timeout=20)
    return context.wrap_socket(raw, server_hostname="localhost")


def seconds_until_closed(connection: ssl.SSLSocket) -> float:
    began = time.monotonic()
    with suppress(ConnectionError):
        while connection.recv(1 << 16):
            pass
    return time.monotonic() - began


def test_slow_and_half_requests_end_at_the_proxy(deployment_tool, tmp_path):
    """With its three time limits at a second; nothing of them reaches the server."""
    login = f"Authorization: {LOGIN}\r\n"
    halves = [
        "POST /v2/models/dbsam/infer HTTP/1.1\r\nHost: x\r\n",
        f"POST /v2/models/dbsam/infer HTTP/1.1\r\nHost: x\r\n{login}Content-Length: 9\r\n\r\n{{",
    ]
    with listener() as (address, got):
        changes = {
            "client_header_timeout 10s": "client_header_timeout 1s",
            "client_body_timeout 30s": "client_body_timeout 1s",
            "server:8000": address,
            "server:8001": address,
        }
        with running(deployment_tool("nginx"), tmp_path, changes) as proxy:
            slow = [tls(proxy) for _ in halves]
            for connection, words in zip(slow, halves, strict=True):
                connection.sendall(words.encode())
            for connection in slow:
                assert seconds_until_closed(connection) < 10
                connection.close()
            assert got == [], "the server heard of neither"
            assert proxy.ask("GET", "/v2/health/ready", Authorization=LOGIN) == 200


def test_who_does_not_read_an_answer_is_let_go(deployment_tool, tmp_path):
    """The server's connection is free again; it would wait for that client otherwise."""
    let_go = threading.Event()

    def answer() -> None:
        with server.accept()[0] as connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
            connection.settimeout(20)
            with suppress(ConnectionError):
                while True:
                    connection.sendall(bytes(1 << 20))
            let_go.set()

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        thread = threading.Thread(target=answer)
        thread.start()
        changes = {
            "send_timeout 60s": "send_timeout 1s",
            "server:8000": address,
            "server:8001": address,
        }
        with running(deployment_tool("nginx"), tmp_path, changes) as proxy:
            connection = tls(proxy)
            words = f"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\nAuthorization: {LOGIN}\r\n\r\n"
            connection.sendall(words.encode())
            assert let_go.wait(15)
            connection.close()
        thread.join(timeout=10)


@pytest.mark.triton
@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_who_asks_too_often_is_busy_in_both_protocols(triton, deployment_tool, tmp_path, transport):
    changes = {
        "rate=20r/s": "rate=1r/m",
        "burst=100": "burst=2",
        "server:8000": triton.http_url,
        "server:8001": triton.grpc_url,
    }
    with running(deployment_tool("nginx"), tmp_path, changes) as proxy:
        access = Access(ca=proxy.certificate, login=f"{USER}:{PASSWORD}")
        url = f"localhost:{proxy.port}"
        with DbsamClient(url, transport, access=access, retries=ONCE) as client:
            for _ in range(3):
                assert client.segment(image(), BOX).masks.shape == (1, 1, 40, 33)
            with pytest.raises(BusyError, match=r"has no time for this"):
                client.segment(image(), BOX)


@pytest.mark.triton
def test_a_load_test_goes_through_tls_and_login(triton, deployment_tool, tmp_path, capsys):
    changes = {"server:8000": triton.http_url, "server:8001": triton.grpc_url}
    login = tmp_path / "login"
    login.write_text(f"{USER}:{PASSWORD}\n")
    with running(deployment_tool("nginx"), tmp_path, changes) as proxy:
        url = f"localhost:{proxy.port}"
        words = ["--url", url, "--http-url", url, "--metrics-url", triton.metrics_url]
        words += ["--ca", str(proxy.certificate), "--login-file", str(login), "--work", "click"]
        words += [
            "--way",
            "grpc",
            "http",
            "--concurrency",
            "1",
            "--seconds",
            "0.2",
            "--warm-up",
            "0",
        ]
        words += ["--image-size", "64", "80", "--output", str(tmp_path / "load")]
        assert run(loadtest.main, words) == 0
        login.write_text(f"{USER}:wrong\n")
        assert run(loadtest.main, words) == 2
    assert "does not know this login" in capsys.readouterr().err
    with (tmp_path / "load" / "loadtest.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["way"] for row in rows] == ["grpc", "http"]
    for row in rows:
        assert 0 < int(row["right"]) == int(row["sent"]) - int(row["shed"]), row


def openssl(folder: Path, words: str) -> None:
    subprocess.run(["openssl", *words.split()], cwd=folder, check=True, capture_output=True)


def make_authority(folder: Path, name: str) -> None:
    """An authority, and the key and certificate of a client that it vouches for."""
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    openssl(
        folder,
        f"req -x509 {key} -days 2 -subj /CN={name}-ca -keyout {name}-ca.key -out {name}-ca.crt",
    )
    openssl(folder, f"req {key} -subj /CN={name} -keyout {name}.key -out {name}.csr")
    signer = f"-CA {name}-ca.crt -CAkey {name}-ca.key -CAcreateserial"
    openssl(folder, f"x509 -req -in {name}.csr {signer} -days 2 -out {name}.crt")


@pytest.mark.triton
def test_certificates_of_clients_in_the_place_of_passwords(triton, deployment_tool, tmp_path):
    """The lines that stand in the configuration as a comment, and the library's own clients."""
    for name in ("viewer", "stranger"):
        make_authority(tmp_path, name)
    changes = {
        "# ssl_client_certificate /etc/dbsam/clients-ca.crt": (
            f"ssl_client_certificate {tmp_path}/viewer-ca.crt"
        ),
        "# ssl_verify_client": "ssl_verify_client",
        'auth_basic "dbsam"': "auth_basic off",
        "server:8000": triton.http_url,
        "server:8001": triton.grpc_url,
    }
    picture = image()
    with DbsamClient(triton.grpc_url) as client:
        expected = client.segment(picture, BOX).masks
    with running(deployment_tool("nginx"), tmp_path, changes) as proxy:
        url = f"localhost:{proxy.port}"
        assert proxy.ask("GET", "/v2/health/ready", Authorization=LOGIN) == 400

        def masks(name: str, transport: str) -> np.ndarray:
            files = {
                "certificate": tmp_path / f"{name}.crt",
                "private_key": tmp_path / f"{name}.key",
            }
            access = Access(ca=proxy.certificate, **files)
            with DbsamClient(url, transport, access=access, retries=ONCE, timeout_s=10) as client:
                return client.segment(picture, BOX).masks

        for transport in ("grpc", "http"):
            np.testing.assert_array_equal(masks("viewer", transport), expected)
            with pytest.raises((InputError, ServingError)):
                masks("stranger", transport)


@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_requests_on_one_image_reach_one_server(deployment_tool, tmp_path, transport):
    """By the lines of docs/sizing.md and the header `dbsam-image`; a one-shot has none."""
    text = SIZING.read_text()
    (chosen,) = re.findall(r"^ *(map \$http_dbsam_image .*\})$", text, re.M)
    assert "hash $image consistent; server a:8001; server b:8001;" in text
    with ExitStack() as stack:
        servers = [stack.enter_context(scripted_server(transport)) for _ in range(2)]
        both = "hash $image consistent; " + " ".join(f"server {one.url};" for one in servers)
        places = {"grpc": "server server:8001;", "http": "server server:8000;"}
        other = next(place for name, place in places.items() if name != transport)
        changes = {
            places[transport]: both,
            other: f"server {servers[0].url};",
            "upstream http_server": f"{chosen}\n    upstream http_server",
        }
        proxy = stack.enter_context(running(deployment_tool("nginx"), tmp_path, changes))
        access = Access(ca=proxy.certificate, login=f"{USER}:{PASSWORD}")
        url = f"localhost:{proxy.port}"
        client = stack.enter_context(DbsamClient(url, transport, access=access, retries=ONCE))
        ids = []
        for _ in range(16):
            opened = client.take(image())
            ids.append(opened.known.id[:8])
            for _ in range(2):
                with suppress(ServingError):  # these servers have no such model
                    opened.predict(boxes=BOX)
        for _ in range(16):
            client.segment(image(), BOX)
        seen = [[request.image for request in server.seen] for server in servers]
    clicks = [[name for name in names if name] for names in seen]
    assert sorted(clicks[0] + clicks[1]) == sorted(2 * ids)
    assert not set(clicks[0]) & set(clicks[1]), "an image is known to one server"
    assert all(clicks), "both have work"
    assert all(names.count("") for names in seen), "one-shots go to both"
