"""Large ONNX graphs: one file with the nodes, and one with the weights beside it.

A file of protobuf ends at 2 GiB. The SHA-256 of the second file stands in the first, so that the
hash of the first is of both. Nothing here needs the package onnx.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DATA_SUFFIX = ".data"
"""Behind the name of an ONNX file: the file with its weights, where they do not fit into it."""
DATA_HASH = "dbsam.data.sha256"
"""Metadata of a model with weights in a second file: the SHA-256 of that."""
_LOCATION = b"\x0a\x08location\x12"
"""Of a tensor in an ONNX file: in which other file its values are; length and name follow."""


@dataclass(frozen=True)
class OnnxContent:
    """The content of a graph's files.

    Attributes:
        model: of the ONNX file.
        data: of the file with its weights; None where they are in `model`.
        location: the name by which `model` knows that file.
    """

    model: bytes
    data: bytes | None = None
    location: str = ""


def data_path(path: Path) -> Path:
    """The file with the weights of a large graph whose ONNX file is `path`."""
    return path.with_name(path.name + DATA_SUFFIX)


def data_names(content: bytes) -> set[str]:
    """Names of the other files in which weights of an ONNX file are; it is not parsed."""
    names, place = set(), content.find(_LOCATION)
    while place >= 0:
        start = place + len(_LOCATION)
        length = content[start] if start < len(content) else 0
        names.add(content[start + 1 : start + 1 + length].decode(errors="replace"))
        place = content.find(_LOCATION, start)
    return names
