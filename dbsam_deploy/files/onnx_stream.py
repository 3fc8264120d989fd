"""One ONNX file written a weight at a time, so that its content never lies in memory as a whole.

Protobuf's own writer holds all weights three times: in the message, in its buffer and as bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx

from ..core.widening import put_varint

_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER


def write_whole(model: onnx.ModelProto, data: Path, stream: BinaryIO) -> None:
    """Write a graph with its weights inside: the bytes that protobuf would write.

    Args:
        model: its larger initializers are external, in `data`; they are left so.
        data: their content.
        stream: of the file.
    """
    tensors = [_parts(tensor) for tensor in model.graph.initializer]
    tags = [_tag(_INITIALIZER, tensor.size) for tensor in tensors]
    before = _fields(model.graph, lambda number: number < _INITIALIZER)
    after = _fields(model.graph, lambda number: number > _INITIALIZER)
    size = len(before) + sum(tensor.size for tensor in tensors) + sum(map(len, tags)) + len(after)
    stream.write(_fields(model, lambda number: number < _GRAPH))
    stream.write(_tag(_GRAPH, size) + before)
    with data.open("rb") as source:
        for tag, tensor in zip(tags, tensors, strict=True):
            stream.write(tag + tensor.head)
            source.seek(tensor.start)
            stream.write(source.read(tensor.length))
            stream.write(tensor.tail)
    stream.write(after + _fields(model, lambda number: number > _GRAPH))


@dataclass(frozen=True)
class _Parts:
    """A tensor as protobuf writes it: `length` bytes of the weights, and what is around them."""

    head: bytes
    start: int = 0
    length: int = 0
    tail: bytes = b""

    @property
    def size(self) -> int:
        return len(self.head) + self.length + len(self.tail)


def _parts(tensor: onnx.TensorProto) -> _Parts:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return _Parts(tensor.SerializeToString())
    place = {entry.key: entry.value for entry in tensor.external_data}
    length = int(place["length"])
    inside = onnx.TensorProto()
    inside.CopyFrom(tensor)
    inside.ClearField("external_data")
    inside.ClearField("data_location")
    head = _fields(inside, lambda number: number < _RAW_DATA) + _tag(_RAW_DATA, length)
    tail = _fields(inside, lambda number: number > _RAW_DATA)
    return _Parts(head, int(place.get("offset", 0)), length, tail)


def _fields(message: Any, wanted: Callable[[int], bool]) -> bytes:
    """Some of a message's fields, by their numbers."""
    part = type(message)()
    for field, value in message.ListFields():
        if not wanted(field.number):
            continue
        if field.is_repeated and field.message_type is not None:
            getattr(part, field.name).extend(value)
        elif field.is_repeated:
            getattr(part, field.name)[:] = value
        elif field.message_type is not None:
            getattr(part, field.name).CopyFrom(value)
        else:
            setattr(part, field.name, value)
    found: bytes = part.SerializeToString()
    return found


def _tag(number: int, size: int) -> bytes:
    """What stands before a field of `size` bytes."""
    out = bytearray()
    put_varint(out, number << 3 | 2)
    put_varint(out, size)
    return bytes(out)
