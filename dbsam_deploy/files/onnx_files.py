"""ONNX files: written whole, checked, and without the notes of the machine that made them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from ..core.errors import ExportError
from .atomic import sha256_of
from .onnx_data import DATA_HASH, OnnxContent, data_path
from .onnx_stream import write_whole

if TYPE_CHECKING:
    import onnx_ir as ir  # of the extra export; reading does without

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of a node: the modules it was traced in, outermost first, then its own name."""
ONE_FILE_BYTES = 2**31 - 2**26
"""Most bytes of weights in an ONNX file itself; the rest is for its nodes."""
STREAMED_BYTES = 64 * 2**20
"""From how many on weights are written one after the other."""
_INSIDE_BYTES = 1024
"""Smaller constants stay in the first file: shapes and axes, which a checker looks into."""


def save_onnx(
    model: onnx.ModelProto | ir.Model, path: Path, check: Callable[[Path], None] | None = None
) -> None:
    """Write a graph; the file appears only if `check` accepts it.

    Args:
        model: the graph; a ModelProto loses its notes as well, see `strip_notes`.
        path: the file; an earlier one is replaced. Weights of more than `ONE_FILE_BYTES` get a file
            of their own beside it, see `data_path`, which appears first.
        check: raises for a file that must not be published, such as `check_valid`.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        if large := weight_bytes(model) > ONE_FILE_BYTES:
            _save_in_two(model, partial)
        elif isinstance(model, onnx.ModelProto):
            strip_notes(model)
            onnx.save(model, partial)
        else:
            _save_in_one(model, partial)
        if check is not None:
            check(partial)
        if large:
            data_path(partial).replace(data_path(path))
        partial.replace(path)
        if not large:
            data_path(path).unlink(missing_ok=True)


def read_content(content: OnnxContent) -> onnx.ModelProto:
    """A graph with all its weights inside, from the content of its files."""
    model = onnx.load_model_from_string(content.model)
    if content.data is None:
        return model
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            start = int(place.get("offset", 0))
            tensor.raw_data = content.data[start : start + int(place["length"])]
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return model


def weight_bytes(model: onnx.ModelProto | ir.Model) -> int:
    """Size of a graph's constants."""
    if isinstance(model, onnx.ModelProto):
        return sum(
            math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            for tensor in model.graph.initializer
        )
    values = (value.const_value for value in model.graph.initializers.values())
    return sum(value.nbytes for value in values if value is not None)


def _save_in_one(model: ir.Model, path: Path) -> None:
    """Write a graph with its weights inside, a weight at a time where there are many."""
    import onnx_ir as ir

    if weight_bytes(model) <= STREAMED_BYTES:
        proto = ir.to_proto(ir.external_data.load_to_model(model))
        strip_notes(proto)
        onnx.save(proto, path)
        return
    data = data_path(path)
    ir.save(model, path, external_data=data.name, size_threshold_bytes=_INSIDE_BYTES)
    proto = onnx.load(path, load_external_data=False)
    strip_notes(proto)
    with path.open("wb") as stream:
        write_whole(proto, data, stream)
    data.unlink()


def _save_in_two(model: onnx.ModelProto | ir.Model, path: Path) -> None:
    """Write a graph and, one after the other, its weights."""
    import onnx_ir as ir

    graph = ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model
    data = data_path(path)
    ir.save(graph, path, external_data=data.name, size_threshold_bytes=_INSIDE_BYTES)
    proto = onnx.load(path, load_external_data=False)
    strip_notes(proto)
    proto.metadata_props.add(key=DATA_HASH, value=sha256_of(data))
    onnx.save(proto, path)


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
