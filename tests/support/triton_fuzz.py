"""Requests that nobody should send to a Triton server, by kind, over gRPC and HTTP."""

from __future__ import annotations

import http.client
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

MODELS = (
    "dbsam",
    "dbsam_prompts",
    "dbsam_interactive",
    "dbsam_encoder",
    "dbsam_decoder",
    "dbsam_prompt_decoder",
)
_ITEM = {"UINT8": 1, "FP32": 4, "INT32": 4, "INT64": 8, "BYTES": 1, "FP64": 8, "BOOL": 1}
_TYPES = {"uint8": "UINT8", "float32": "FP32", "int32": "INT32", "object": "BYTES"}


@dataclass(frozen=True)
class Tensor:
    """One input as it goes over the wire; `raw` need not fit `shape`."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes


@dataclass(frozen=True)
class Message:
    """One request; `others` are further fields of gRPC's message or members of HTTP's JSON."""

    model: str
    inputs: tuple[Tensor, ...]
    others: dict[str, Any] = field(default_factory=dict)


def right_message(model: str, rng: np.random.Generator, side: int) -> Message:
    """A request that the model answers.

    Args:
        model: one of `MODELS`.
        rng: draws the image.
        side: of the model frame.
    """
    grid = side // 16
    arrays: dict[str, np.ndarray] = {}
    if model in MODELS[:3]:
        arrays["raw_image"] = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    if model in ("dbsam", "dbsam_interactive"):
        arrays["boxes"] = np.array([[2, 3, 30, 25]], np.float32)
    if model == "dbsam_prompts":
        arrays["point_coords"] = np.array([[[5, 5], [0, 0]]], np.float32)
        arrays["point_labels"] = np.array([[1, -1]], np.int32)
        arrays["mask_input"] = np.zeros((1, 4 * grid, 4 * grid), np.float32)
        arrays["has_mask_input"] = np.zeros(1, np.float32)
    if model == "dbsam_encoder":
        arrays["image"] = np.zeros((1, 3, side, side), np.float32)
    if model in MODELS[4:]:
        arrays["image_embeddings"] = np.zeros((1, 256, grid, grid), np.float32)
    if model == "dbsam_decoder":
        arrays["boxes"] = np.array([[[2, 3, 30, 25]]], np.float32)
    if model == "dbsam_prompt_decoder":
        arrays["point_coords"] = np.array([[[[5, 5], [0, 0]]]], np.float32)
        arrays["point_labels"] = np.array([[[1, -1]]], np.int32)
        arrays["mask_input"] = np.zeros((1, 1, 1, 4 * grid, 4 * grid), np.float32)
        arrays["has_mask_input"] = np.zeros((1, 1), np.float32)
    inputs = tuple(
        Tensor(name, _TYPES[str(array.dtype)], array.shape, array.tobytes())
        for name, array in arrays.items()
    )
    return Message(model, inputs)


def _shape(change: Callable[[tuple[int, ...]], tuple[int, ...]], fill: bool = False) -> Any:
    """A kind: the tensor's shape changed, with no data or (`fill`) as much as it says."""

    def mutate(tensor: Tensor, rng: np.random.Generator) -> Tensor:
        shape = change(tensor.shape)
        size = int(np.prod([max(0, axis) for axis in shape], dtype=object)) * _ITEM[tensor.datatype]
        raw = rng.bytes(size) if fill and size < 2**24 else b""
        return replace(tensor, shape=shape, raw=raw)

    return mutate


def _raw(change: Callable[[bytes, np.random.Generator], bytes]) -> Any:
    return lambda tensor, rng: replace(tensor, raw=change(tensor.raw, rng))


def _type(datatype: str) -> Any:
    return lambda tensor, rng: replace(tensor, datatype=datatype)


def _filled(value: float) -> Any:
    def mutate(tensor: Tensor, rng: np.random.Generator) -> Tensor:
        dtype = {"FP32": np.float32, "INT32": np.int32}.get(tensor.datatype, np.uint8)
        with np.errstate(all="ignore"):
            array = np.full(tensor.shape, value).astype(dtype)
        return replace(tensor, raw=array.tobytes())

    return mutate


TENSOR_KINDS: dict[str, Any] = {
    "wraps to nothing": _shape(lambda s: (2**62, 4, *s[2:])),
    "wraps, three axes": _shape(lambda s: (2**33, 2**31, 3)),
    "wraps, many axes": _shape(lambda s: (2**16,) * 4),
    "wraps beside the last axis": _shape(lambda s: (2**60, *s[1:])),
    "wraps beside the first axis": _shape(lambda s: (s[0], 2**60, *s[2:])),
    "wraps with a zero": _shape(lambda s: (0, 2**62, 3)),
    "largest axis": _shape(lambda s: (2**63 - 1, *s[1:])),
    "large without data": _shape(lambda s: (2**31, *s[1:])),
    "negative axis": _shape(lambda s: (-1, *s[1:])),
    "most negative axis": _shape(lambda s: (-(2**63), *s[1:])),
    "all negative": _shape(lambda s: tuple(-axis for axis in s)),
    "no axes": _shape(lambda s: ()),
    "zero axis": _shape(lambda s: (0, *s[1:]), fill=True),
    "last axis zero": _shape(lambda s: (*s[:-1], 0), fill=True),
    "one axis less": _shape(lambda s: s[1:], fill=True),
    "one axis more": _shape(lambda s: (1, *s), fill=True),
    "forty axes": _shape(lambda s: (1,) * 40, fill=True),
    "last axis longer": _shape(lambda s: (*s[:-1], s[-1] + 1), fill=True),
    "first axis twice": _shape(lambda s: (2 * s[0], *s[1:]), fill=True),
    "many rows": _shape(lambda s: (1000, *s[1:]), fill=True),
    "batch of 100": _shape(lambda s: (100, *s[1:]), fill=True),
    "too little data": _raw(lambda raw, rng: raw[:-1]),
    "no data": _raw(lambda raw, rng: b""),
    "too much data": _raw(lambda raw, rng: raw + b"x"),
    "random bits": _raw(lambda raw, rng: rng.bytes(len(raw))),
    "all bits set": _raw(lambda raw, rng: b"\xff" * len(raw)),
    "not a number": _filled(np.nan),
    "infinite": _filled(-np.inf),
    "largest float": _filled(3e38),
    "denormal": _filled(1e-40),
    "negative": _filled(-7),
    "as FP64": _type("FP64"),
    "as INT64": _type("INT64"),
    "as BYTES": _type("BYTES"),
    "as BOOL": _type("BOOL"),
    "no such type": _type("FP33"),
    "empty type": _type(""),
    "no name": lambda tensor, rng: replace(tensor, name=""),
    "another name": lambda tensor, rng: replace(tensor, name="x" * 5000),
    "name of another encoding": lambda tensor, rng: replace(tensor, name="b\u00f6xes\n\t\u2028"),
}
"""Kind → one input of a right request, damaged."""


def _image_ids() -> Iterator[tuple[str, bytes]]:
    yield "id of nothing", b""
    yield "id too short", b"\x04\x00\x00\x00abcd"
    yield "id longer than said", b"\x01\x00\x00\x00abcd"
    yield "id shorter than said", b"\xff\xff\xff\x7fabcd"
    yield "id of bytes", b"\x40\x00\x00\x00" + b"\xff" * 64
    yield "two ids", b"\x01\x00\x00\x00a\x01\x00\x00\x00b"


def _messages(right: Message, rng: np.random.Generator) -> Iterator[tuple[str, Message]]:
    first = right.inputs[0]
    yield "nothing", replace(right, inputs=())
    yield "one input missing", replace(right, inputs=right.inputs[1:])
    yield "an input twice", replace(right, inputs=(*right.inputs, first))
    yield "an unknown input", replace(right, inputs=(*right.inputs, replace(first, name="more")))
    yield "no such model", replace(right, model="dbsam_\u00fc")
    for kind, raw in _image_ids():
        odd = Tensor("image_id", "BYTES", (1,), raw)
        yield kind, replace(right, inputs=(*right.inputs, odd))
    yield (
        "id of many",
        replace(right, inputs=(*right.inputs, Tensor("image_id", "BYTES", (2**62, 4), b""))),
    )
    yield "an unknown output", replace(right, others={"outputs": [{"name": "nothing"}]})
    outputs = [{"name": "masks", "parameters": {"classification": 3}}]
    yield "classification", replace(right, others={"outputs": outputs})
    region = {"shared_memory_region": "none", "shared_memory_byte_size": 9}
    yield "no such shared memory", replace(right, others={"first_parameters": region})
    yield "a long request id", replace(right, others={"id": "i\n\u00f6" * 3000})
    for value in (-1, 2**62, 1):
        yield f"timeout {value}", replace(right, others={"parameters": {"timeout": value}})
    odd_parameters = {"sequence_id": 7, "priority": 9, "binary_data_output": True}
    yield "odd parameters", replace(right, others={"parameters": odd_parameters})


def kinds(model: str, rng: np.random.Generator, side: int) -> Iterator[tuple[str, Message]]:
    """Every kind of wrong request of one model; which input is damaged is drawn."""
    right = right_message(model, rng, side)
    for kind, mutate in TENSOR_KINDS.items():
        index = int(rng.integers(len(right.inputs)))
        inputs = list(right.inputs)
        inputs[index] = mutate(inputs[index], rng)
        yield kind, replace(right, inputs=tuple(inputs))
    yield from _messages(right, rng)


def send_grpc(stub: service_pb2_grpc.GRPCInferenceServiceStub, message: Message) -> str:
    """Status of the answer."""
    request = service_pb2.ModelInferRequest(model_name=message.model)
    for index, tensor in enumerate(message.inputs):
        item = request.inputs.add(name=tensor.name, datatype=tensor.datatype)
        item.shape.extend(tensor.shape)
        extra = message.others.get("first_parameters") if index == 0 else None
        _fill(item.parameters, extra or {})
        if not extra:
            request.raw_input_contents.append(tensor.raw)
    request.id = message.others.get("id", "")
    _fill(request.parameters, message.others.get("parameters", {}))
    for output in message.others.get("outputs", ()):
        item = request.outputs.add(name=output["name"])
        _fill(item.parameters, output.get("parameters", {}))
    try:
        stub.ModelInfer(request, timeout=20)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def _fill(parameters: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, bool):
            parameters[name].bool_param = value
        elif isinstance(value, int):
            parameters[name].int64_param = value
        else:
            parameters[name].string_param = value


def send_http(url: str, message: Message, rng: np.random.Generator) -> str:
    """Status of the answer; now and then the body itself is damaged too."""
    inputs = []
    for index, tensor in enumerate(message.inputs):
        parameters = {"binary_data_size": len(tensor.raw)}
        if index == 0 and "first_parameters" in message.others:
            parameters = message.others["first_parameters"]
        inputs.append(
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": parameters,
            }
        )
    others = {key: message.others[key] for key in message.others if key != "first_parameters"}
    head = json.dumps({"inputs": inputs, **others}).encode()
    body = head + b"".join(
        tensor.raw
        for index, tensor in enumerate(message.inputs)
        if not (index == 0 and "first_parameters" in message.others)
    )
    headers = {"Inference-Header-Content-Length": str(len(head))}
    damage = int(rng.integers(24))
    if damage == 0:
        headers = {}
    elif damage == 1:
        headers = {"Inference-Header-Content-Length": str(rng.choice([-1, 0, 3, 2**62]))}
    elif damage == 2:
        body = body[: len(body) // 2]
    elif damage == 3:
        body, headers = zlib.compress(body)[:-3], {"Content-Encoding": "deflate"}
    elif damage == 4:
        body, headers = b'{"inputs":' + b"[" * 20_000, {}
    elif damage == 5:
        data = [1e400, "text", None, {"a": [2**70]}]
        odd = [{"name": "boxes", "shape": [1, 4], "datatype": "FP32", "data": data}]
        body, headers = json.dumps({"inputs": odd}).encode(), {}
    return _post(url, message.model, body, headers)


def _post(url: str, model: str, body: bytes, headers: dict[str, str]) -> str:
    connection = http.client.HTTPConnection(url, timeout=20)
    path = f"/v2/models/{model.encode('ascii', 'replace').decode()}/infer"
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()
    return str(answer.status)
