"""An ONNX graph in half precision → the same graph in float32, for a processor without half.

ONNX Runtime has few CPU kernels for float16. It puts casts around the others, and finds none of the
patterns that it has one kernel for: GELU is five passes over the largest tensors. With the weights
widened once, when a session opens, all values stay float32 between them: closer to the model, and
as quick as a float32 export.

The file is rewritten as protobuf's wire format, field by field: a server has no package onnx.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

MOST_BYTES = 64 << 20
"""Larger files stay in half precision: their weights would take twice the memory."""
_FLOAT, _HALF = 1, 10
"""`TensorProto.DataType`."""
_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}
"""Wire types: those of a fixed size, and their bytes."""

Field = tuple[int, int, memoryview]
"""Number and wire type of a field, and its content; of a varint its own bytes."""


@dataclass(frozen=True)
class _Message:
    """What of a message is rewritten; everything else is copied.

    Attributes:
        inner: number of a field → the message in it.
        types: fields with a `TensorProto.DataType`.
    """

    inner: dict[int, _Message] = field(default_factory=dict)
    types: tuple[int, ...] = ()


_TENSOR = _Message(types=(2,))
_ATTRIBUTE = _Message()
_NODE = _Message({5: _ATTRIBUTE})
_VALUE = _Message({2: _Message({1: _Message(types=(1,))})})
_GRAPH = _Message({1: _NODE, 5: _TENSOR, 11: _VALUE, 12: _VALUE, 13: _VALUE})
_ATTRIBUTE.inner.update({5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH})
_FUNCTION = _Message({7: _NODE, 12: _VALUE})
_MODEL = _Message({7: _GRAPH, 25: _FUNCTION})
_RAW, _INT32 = 9, 5
"""Fields of a tensor's values: their bytes, and half precision as whole numbers."""
_NAME, _INT = 1, 3
"""Fields of an attribute."""


def widened(model: bytes) -> bytes:
    """The content of an ONNX file with float32 in place of float16.

    Args:
        model: of a file whose weights are in it; inputs and outputs are not float16.

    Returns:
        `model` itself if no weight in it is float16 or it is larger than `MOST_BYTES`.
    """
    content = memoryview(model)
    if len(model) > MOST_BYTES or not any(map(_is_half, _weights(content))):
        return model
    out = bytearray()
    _rewrite(content, _MODEL, out)
    return bytes(out)


def _weights(model: memoryview) -> Iterator[memoryview]:
    for number, _, graph in _fields(model):
        if number == 7:
            yield from (tensor for inside, _, tensor in _fields(graph) if inside == 5)


def _is_half(tensor: memoryview) -> bool:
    return any(number == 2 and value == bytes([_HALF]) for number, _, value in _fields(tensor))


def _rewrite(content: memoryview, message: _Message, out: bytearray) -> None:
    """Append a message to `out`."""
    fields = list(_fields(content))
    if message is _ATTRIBUTE and (_NAME, _BYTES, b"to") in fields:
        message = _Message(types=(_INT,))
    half = message is _TENSOR and _is_half(content)
    for number, wire, value in fields:
        if number in message.types and value == bytes([_HALF]):
            _put(out, number, wire, bytes([_FLOAT]))
        elif number in message.inner:
            part = bytearray()
            _rewrite(value, message.inner[number], part)
            _put(out, number, wire, part)
        elif half and number == _RAW:
            wide = np.frombuffer(value, "<f2").astype("<f4")
            _put(out, number, wire, wide.tobytes())
        elif half and number == _INT32:
            raise ValueError("float16 weights as whole numbers: expected raw data")
        else:
            _put(out, number, wire, value)


def _fields(content: memoryview) -> Iterator[Field]:
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        number, wire = key >> 3, key & 7
        start = place
        if wire == _VARINT:
            _, place = _varint(content, place)
        elif wire == _BYTES:
            length, start = _varint(content, place)
            place = start + length
        else:
            place += _FIXED[wire]
        yield number, wire, content[start:place]


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    """A number and the place behind it."""
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _put(out: bytearray, number: int, wire: int, value: bytes | bytearray | memoryview) -> None:
    put_varint(out, number << 3 | wire)
    if wire == _BYTES:
        put_varint(out, len(value))
    out += value


def put_varint(out: bytearray, value: int) -> None:
    """Append a number as protobuf writes it, seven bits a byte."""
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
