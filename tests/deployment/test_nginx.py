"""deployment/nginx/nginx.conf in the real nginx, in front of the real server."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import time
import urllib.request
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from support.nginx import CONFIG, LOGIN, PASSWORD, USER, Proxy, listener, running
from support.traffic import masks_over_grpc, masks_over_http

from dbsam_deploy.clients.access import Access
from dbsam_deploy.clients.async_client import AsyncDbsamClient
from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.core.errors import InputError, ServingError

BOX = np.array([[2, 3, 30, 25]], np.float32)
BODY_LIMIT = 1 << 20


def image() -> np.ndarray:
    return np.random.default_rng().integers(0, 256, (40, 33, 3), dtype=np.uint8)


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
