"""Requests to a viewer server as no client makes them, byte by byte from a seed."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct

import numpy as np
from nnInteractive.inference.remote.serialization import pack_array

from .viewer import BOX, IMAGE
from .wedge import SHAPE, wedge

GET, POST = "GET", "POST"
ROUTES = {
    "healthz": GET,
    "claim": POST,
    "capabilities": GET,
    "release": POST,
    "heartbeat": POST,
    "lease_status": GET,
    "set_image": POST,
    "set_target_buffer": POST,
    "set_do_autozoom": POST,
    "reset_interactions": POST,
    "undo": POST,
    "predict": POST,
    "add_point_interaction": POST,
    "add_bbox_interaction": POST,
    "add_scribble_interaction": POST,
    "add_lasso_interaction": POST,
    "add_initial_seg_interaction": POST,
}
REFUSALS = {400, 401, 404, 405, 408, 410, 413}
_ELSEWHERE = ["claim/", "/claim", "%00", "openapi.json", "..%2f..%2fetc", "x" * 3000, "set_image;"]
_VALUES = (None, True, False, -1, 0, 5, 1.5, 1e308, "x", "\ud800", [], {}, [1, 2, 3], BOX)
_NAMES = ("coordinates", "bbox_coords", "include_interaction", "run_prediction", "shape", "dtype")
_NAMES += ("interaction_bbox", "do_autozoom", "image_properties", "override_capability_checks")


def address(url: str) -> tuple[str, int]:
    """Host and port."""
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def request(rng: random.Random, token: str) -> tuple[str, bool, bytes]:
    """Route, whether the request is whole, and its bytes."""
    path = rng.choice(list(ROUTES))
    method = (
        ROUTES[path] if rng.random() < 0.93 else rng.choice(["PUT", "HEAD", "OPTIONS", "X", GET])
    )
    fields = _fields(rng)
    body = b"" if method == GET else _body(rng, path, fields)
    lines = [f"{method} /{path if rng.random() < 0.97 else rng.choice(_ELSEWHERE)} HTTP/1.1"]
    lines += ["Host: x", "Connection: close"]
    token = token if rng.random() < 0.93 else rng.choice(["", "0" * 32, "\xe9", "x" * 9000])
    lines += [f"X-Lease-Token: {token}"] * rng.choice([1, 1, 1, 1, 2])
    meta = (
        json.dumps(fields) if rng.random() < 0.9 else rng.choice(["{", "[]", "\xff", "[" * 60_000])
    )
    lines += [f"X-Meta: {meta}"] * rng.choice([0, 1, 1, 1, 1, 2])
    kind = rng.choice(["application/json", "application/octet-stream", "text/html", "a/b; c=\xe9"])
    lines += [f"Content-Type: {kind}"] * rng.choice([0, 1, 1, 2])
    framing, is_whole, content = _framed(rng, body)
    head = "\r\n".join([*lines, *framing]) + "\r\n\r\n"
    return path, is_whole, head.encode("latin-1") + content


def _framed(rng: random.Random, body: bytes) -> tuple[list[str], bool, bytes]:
    """Headers of the length, whether it is the right one, and the body behind them."""
    length = [f"Content-Length: {len(body)}"]
    half = len(body) // 2
    chunked = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (
        half,
        body[:half],
        len(body) - half,
        body[half:],
    )
    choices = [(length, True, body)] * 12
    if half:
        choices += [(["Transfer-Encoding: chunked"], True, chunked)] * 2
    choices += [
        (["Transfer-Encoding: chunked"], False, b"zz\r\n" + body),
        (["Transfer-Encoding: chunked"], False, chunked[:half]),
        (["Transfer-Encoding: gzip"], False, body),
        ([*length, "Transfer-Encoding: chunked"], False, chunked),
        ([*length, f"Content-Length: {half}"], False, body),
        ([f"Content-Length: {len(body) + 7}"], False, body),
        ([f"Content-Length: {half}"], False, body),
        (["Content-Length: -1"], False, body),
        (["Content-Length: 99999999999999999999"], False, body),
        ([], False, body),
    ]
    return rng.choice(choices)


def _fields(rng: random.Random) -> dict[str, object]:
    good = {"coordinates": [5, 15, 25], "bbox_coords": BOX, "include_interaction": True}
    good |= {"shape": list(SHAPE), "dtype": "uint8", "do_autozoom": True}
    fields = good if rng.random() < 0.6 else {}
    changed = rng.sample(_NAMES, rng.choice([0, 0, 1, 2]))
    return fields | {name: rng.choice(_VALUES) for name in changed}


def _body(rng: random.Random, path: str, fields: dict[str, object]) -> bytes:
    text = json.dumps(fields).encode()
    if rng.random() < 0.1:
        text = rng.choice(
            [b"[" * 60_000, b'{"a":' * 9_000, b"\xff\xfe", b"1" * 5000, text + text, b" " * 70_000]
        )
    takes_array = path.startswith(("set_image", "add_scr", "add_las", "add_ini"))
    if not takes_array and rng.random() < 0.95:
        return text
    body = bytearray(_array(rng))
    for _ in range(rng.choice([0, 0, 1, 1, 3])):
        place = min(int(rng.expovariate(1 / 40)), len(body) - 1)  # headers above all
        body[place] = rng.randrange(256)
    return bytes(body[: rng.choice([len(body)] * 6 + [rng.randrange(len(body))])])


def _array(rng: random.Random) -> bytes:
    """A packed array: usable, of another form, or one that claims to be large."""
    kind = rng.randrange(8)
    if kind < 3:
        return pack_array(rng.choice([IMAGE, wedge(), wedge()[5:6]]))
    shape = rng.choice([(1, *SHAPE), SHAPE, (1, 1, 30, 30), (1, 9_000, 1, 1), (1, 1, 1, 1), (7,)])
    dtype = rng.choice(["bool", "int8", "uint64", "int64", "float16", "float32", "float64"])
    if kind < 6:
        values = np.zeros(shape, dtype)
        ends = [0, 1] if values.dtype.kind == "b" else _ends(values.dtype)
        values.reshape(-1)[:] = rng.choices(ends, k=values.size)
        return pack_array(values)
    sizes = rng.choice([(1, 2**20, 2**20, 2**20), (2**62, 2**62), (0, -1, 5), (2**40,), (5, 6)])
    start = struct.pack("<4sBBBB", b"NNIA", 1, 1, len(sizes), 5) + b"uint8"
    frame = pack_array(np.zeros(2**16, np.uint8))[8 + 5 + 8 + 4 + 16 :]
    plain = rng.choice([2**16, 2**30, 2**50, 0])
    chunks = rng.choice([0, 1, 2**32 - 1])
    return start + struct.pack(f"<{len(sizes)}qIQQ", *sizes, chunks, plain, len(frame)) + frame


def _ends(dtype: np.dtype) -> list[float]:
    if dtype.kind == "f":
        most = float(np.finfo(dtype).max)
        return [0.0, 1.5, most, -most, float("nan"), float("inf"), float("-inf")]
    about = np.iinfo(dtype)
    return [0, 1, int(about.min), int(about.max)]


def exchange(url: str, content: bytes, *, is_whole: bool) -> tuple[int | None, bytes]:
    """Status and body of the answer; None where the server just hung up on what is not whole."""
    answer = bytearray()
    connection = socket.create_connection(address(url), timeout=20)
    with connection, contextlib.suppress(ConnectionError):
        connection.sendall(content)
        if not is_whole:
            connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65536):
            answer += part
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else None), body
