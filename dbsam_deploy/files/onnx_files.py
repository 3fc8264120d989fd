"""ONNX files: written whole, checked, and without the notes of the machine that made them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from ..core.errors import ExportError

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of a node: the modules it was traced in, outermost first, then its own name."""


def save_onnx(
    model: onnx.ModelProto | ir.Model, path: Path, check: Callable[[Path], None] | None = None
) -> None:
    """Write a graph with its weights inside; the file appears only if `check` accepts it.

    Args:
        model: the graph; a ModelProto loses its notes as well, see `strip_notes`.
        path: the file; an earlier one is replaced.
        check: raises for a file that must not be published, such as `check_valid`.
    """
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    strip_notes(proto)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        onnx.save(proto, partial)
        if check is not None:
            check(partial)
        partial.replace(path)


def check_valid(path: Path) -> None:
    """Check a file with onnx's checker and shape inference.

    Raises:
        ExportError: they refuse it.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name}: onnx's checker refuses it: {error}") from error


def strip_notes(model: onnx.ModelProto) -> None:
    """Drop all metadata but the module paths of nodes: stack traces name this machine's files."""
    for owner in _owners(model):
        kept = [note for note in owner.metadata_props if note.key == SCOPES]
        del owner.metadata_props[:]
        owner.metadata_props.extend(kept)


def _owners(model: onnx.ModelProto) -> Iterator[Any]:
    """Everything in a model that metadata hangs on."""
    yield model
    yield from _in_graph(model.graph)
    for function in model.functions:
        yield function
        yield from function.value_info
        yield from _in_nodes(function.node)


def _in_graph(graph: onnx.GraphProto) -> Iterator[Any]:
    yield graph
    for values in (graph.input, graph.output, graph.value_info, graph.initializer):
        yield from values
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[Any]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _in_graph(attribute.g)
            for graph in attribute.graphs:
                yield from _in_graph(graph)
