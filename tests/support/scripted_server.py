"""Plays a Triton server that refuses requests by a script, over gRPC and HTTP.

It answers `dbsam` alone, with empty masks: what is tested with it is what a client does with
refusals. Masks come from the real server in other tests.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
}


@dataclass(frozen=True)
class Seen:
    """A request as the server got it: id, time limit in µs, when it came, `dbsam-image`."""

    id: str
    timeout_us: int
    at: float
    image: str


@dataclass
class Script:
    """What the next requests are refused with, as (gRPC's status, text); nothing: an answer."""

    url: str = ""
    refusals: list[tuple[str, str]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    def next(self, number: str, timeout_us: int, image: str) -> tuple[str, str] | None:
        self.seen.append(Seen(number, timeout_us, time.monotonic(), image))
        return self.refusals.pop(0) if self.refusals else None


def _outputs(shapes: dict[str, list[int]]) -> dict[str, tuple[str, list[int]]]:
    if "raw_image" not in shapes:
        return {}
    height, width, _ = shapes["raw_image"]
    count = shapes["boxes"][0]
    return {"masks": ("UINT8", [count, height, width]), "iou_scores": ("FP32", [count])}


@contextmanager
def scripted_server(protocol: str, port: int = 0) -> Iterator[Script]:
    """A server of the protocol on a loopback port, by default a free one."""
    script = Script(url=f"127.0.0.1:{port}")
    with (_serve_grpc if protocol == "grpc" else _serve_http)(script):
        yield script


@contextmanager
def _serve_grpc(script: Script) -> Iterator[None]:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
        def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
            image = dict(context.invocation_metadata()).get("dbsam-image", "")
            timeout_us = request.parameters["timeout"].int64_param
            refusal = script.next(request.id, timeout_us, image)
            if refusal is not None:
                context.abort(getattr(grpc.StatusCode, refusal[0]), refusal[1])
            answer = service_pb2.ModelInferResponse(model_name=request.model_name)
            shapes = {item.name: list(item.shape) for item in request.inputs}
            for name, (datatype, shape) in _outputs(shapes).items():
                answer.outputs.add(name=name, datatype=datatype, shape=shape)
                size = {"UINT8": 1, "FP32": 4}[datatype]
                for length in shape:
                    size *= length
                answer.raw_output_contents.append(bytes(size))
            return answer

    server = grpc.server(ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
    script.url = f"127.0.0.1:{server.add_insecure_port(script.url)}"
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


@contextmanager
def _serve_http(script: Script) -> Iterator[None]:
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            if ended.is_set():  # a connection outlives the server that opened it
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers["Content-Length"]))
            length = int(self.headers.get("Inference-Header-Content-Length", len(body)))
            request = json.loads(body[:length])
            image = self.headers.get("dbsam-image", "")
            refusal = script.next(request["id"], request["parameters"]["timeout"], image)
            if refusal is not None:
                self._answer(HTTP_STATUS[refusal[0]], {"error": refusal[1]})
                return
            outputs = []
            shapes = {item["name"]: item["shape"] for item in request["inputs"]}
            for name, (datatype, shape) in _outputs(shapes).items():
                count = 1
                for one in shape:
                    count *= one
                item = {"name": name, "datatype": datatype, "shape": shape, "data": [0] * count}
                outputs.append(item)
            self._answer(200, {"model_name": "dbsam", "model_version": "1", "outputs": outputs})

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", int(script.url.split(":")[1])), Handler)
    script.url = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
