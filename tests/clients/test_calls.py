"""What a client says when there is no server, when it is silent, or when the caller is wrong."""

from __future__ import annotations

import asyncio
import importlib
import re
import socket
import threading

import numpy as np
import pytest

from dbsam_deploy.clients.async_client import AsyncDbsamClient
from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.core.errors import EngineError, InputError, ServingError
from dbsam_deploy.extras import pip_line

WAYS = [("grpc", False), ("grpc", True), ("http", False), ("http", True)]


def random_case(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image and one box inside it."""
    image = np.random.default_rng().integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, np.array([[1, 2, width - 1, height - 2]], np.float32)


@pytest.fixture
def closed_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.mark.parametrize(("protocol", "shared"), WAYS)
def test_no_server_is_one_clear_error(closed_port, protocol, shared):
    url, case = f"127.0.0.1:{closed_port}", random_case(20, 20)
    with (
        DbsamClient(url, protocol, shared_memory=shared) as client,
        pytest.raises(ServingError, match=r"no Triton server answers.*dbsam_deploy\.serve"),
    ):
        client.segment(*case)

    async def ask():
        async with AsyncDbsamClient(url, protocol, shared_memory=shared) as client:
            await client.segment(*case)

    with pytest.raises(ServingError, match="no Triton server answers"):
        asyncio.run(ask())


def test_a_server_that_never_answers_times_out():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        for protocol in ("grpc", "http"):
            with (
                DbsamClient(url, protocol, timeout_s=0.3) as client,
                pytest.raises(ServingError, match="did not answer in time"),
            ):
                client.segment(*random_case(20, 20))


def test_something_that_is_no_triton_server_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            connection, _ = other.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"I am a teapot\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with (
            DbsamClient(f"127.0.0.1:{other.getsockname()[1]}", "http", timeout_s=5) as client,
            pytest.raises(ServingError),
        ):
            client.segment(*random_case(20, 20))
        thread.join()


def test_mistakes_are_found_before_anything_is_sent(closed_port):
    image, boxes = random_case(20, 30)
    with DbsamClient(f"127.0.0.1:{closed_port}") as client:
        for bad, box, message in (
            (image.astype(float), boxes, "dtype float64"),
            (image[..., 0], boxes, "image shape"),
            (image, boxes[:0], "0 boxes"),
            (image, boxes + 30, "outside the image"),
            (image, boxes * np.nan, "finite"),
        ):
            with pytest.raises(InputError, match=message):
                client.segment(bad, box)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("http://localhost:8000", {}, "expected host:port"),
        ("localhost", {}, "expected host:port"),
        ("localhost:8001", {"transport": "ftp"}, "expected grpc or http"),
        ("localhost:8001", {"timeout_s": 0}, "more than 0 seconds"),
        ("localhost:8001", {"timeout_s": float("nan")}, "more than 0 seconds"),
    ],
)
def test_unusable_options_are_named(url, options, message):
    for client in (DbsamClient, AsyncDbsamClient):
        with pytest.raises(InputError, match=message):
            client(url, **options)


def test_a_missing_library_names_the_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(EngineError, match=re.escape(pip_line("client"))):
        DbsamClient("localhost:8001")
