"""Graphs → ONNX files, typed in the graph, checked, with the contract's names and axes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import (
    collapse_slice2_rule,
    collapse_slice_rule,
    no_op_transpose_rule,
)
from torch import nn

from ..core.contract import Geometry, GraphSpec, graph_specs
from ..core.errors import ExportError
from ..files.onnx_files import SCOPES, check_valid, save_onnx
from ..model import DbSam
from ..recipe import Recipe
from .encoder_decoder import build_graph, example_inputs
from .precision import apply_precision
from .tracing import trace

FOLDED_BYTES = 64 * 2**20
"""Largest constant that is folded; the widest weight matrix has 25 MiB."""

_LAYOUT_OPS = {"Cast", "Reshape", "Squeeze", "Unsqueeze"}
"""Ops at a graph's float32 edges that move data without computing."""


@dataclass(frozen=True)
class ExportedGraph:
    """One ONNX file: `name` of the graph, its `path`, node count and size."""

    name: str
    path: Path
    nodes: int
    size_bytes: int


def export_graph(model: DbSam, name: str, recipe: Recipe, folder: Path) -> ExportedGraph:
    """Export one graph of the contract to `folder/<name>.onnx`.

    The file appears only when it passed onnx's checker, shape inference and the contract.

    Args:
        model: reference model, left unchanged.
        name: graph name, see `contract.graph_specs`.
        recipe: precision, opset and islands.
        folder: existing output directory.

    Raises:
        ExportError: torch cannot export the graph, or the result breaks the contract or the recipe.
    """
    spec = graph_specs(model.config.frame)[name]
    graph = build_graph(model, name)
    islands = apply_precision(graph, recipe)
    program = _torch_export(graph, spec, model.config.frame, recipe.opset)
    simplify(program.model)
    _name_axes(program.model, spec)
    fold_reshapes(program.model)
    check_precision(program.model, recipe, islands)
    program.model.producer_name = "dbsam_deploy"
    path = folder / f"{name}.onnx"
    save_onnx(program.model, path, lambda partial: check_onnx(partial, spec))
    return ExportedGraph(name, path, len(program.model.graph), path.stat().st_size)


def _torch_export(
    graph: nn.Module, spec: GraphSpec, size: Geometry, opset: int
) -> torch.onnx.ONNXProgram:
    dynamic = {tensor.name: tensor.dynamic_axes for tensor in spec.inputs}
    inputs = example_inputs(spec.name, size)
    return trace(graph, inputs, dynamic, spec.output_names, opset=opset)


def simplify(model: ir.Model) -> None:
    """Inline, fold constants, and drop what repeats, is unused or does nothing.

    The part of torch's own optimisation that these graphs profit from; all of its pattern rewrites
    together take half of the export's time.
    """
    common_passes.InlinePass()(model)
    fold_constants_ir(
        model,
        onnx_shape_inference=True,
        input_size_limit=FOLDED_BYTES,
        output_size_limit=FOLDED_BYTES,
    )
    rewrite(model, [collapse_slice_rule, collapse_slice2_rule, no_op_transpose_rule])
    ir.passes.Sequential(
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common_passes.DeduplicateInitializersPass(),
        common_passes.IdentityEliminationPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.RemoveUnusedNodesPass(),
        common_passes.OutputFixPass(),
        common_passes.NameFixPass(),
    )(model)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _name_axes(model: ir.Model, spec: GraphSpec) -> None:
    """Give dynamic axes the contract's names everywhere instead of the exporter's symbols."""
    names: dict[str, str] = {}
    for value, tensor in zip(model.graph.inputs, spec.inputs, strict=True):
        for axis, name in tensor.dynamic_axes.items():
            symbol = value.shape[axis] if value.shape is not None else None
            if not isinstance(symbol, ir.SymbolicDim) or symbol.value is None:
                raise ExportError(f"{tensor.name}: axis {axis} came out as {symbol}, not dynamic")
            if names.setdefault(symbol.value, name) != name:
                raise ExportError(f"{spec.name}: axes {name} and {names[symbol.value]} were merged")
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape(
                names.get(d.value, d.value) if isinstance(d, ir.SymbolicDim) and d.value else d
                for d in value.shape
            )


def fold_reshapes(model: ir.Model) -> int:
    """Make every Reshape's target a constant, so that no shape is computed at run time.

    A dynamic axis that stays in place becomes 0 ("copy"), another one -1 ("the rest").

    Returns:
        The number of targets that were folded.

    Raises:
        ExportError: a target needs more than one -1.
    """
    folded = 0
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value:
            continue
        source, target = node.inputs[0], node.outputs[0].shape
        if source is None or source.shape is None or target is None:
            raise ExportError(f"{node.name}: a Reshape of unknown shape")
        dims = [
            int(d)
            if isinstance(d, int)
            else 0
            if i < len(source.shape) and source.shape[i] == d and d.value
            else -1
            for i, d in enumerate(target)
        ]
        if dims.count(-1) > 1:
            raise ExportError(f"{node.name}: Reshape to {target} cannot be a constant")
        shape = ir.Value(
            name=f"{node.outputs[0].name}_shape",
            const_value=ir.tensor(dims, ir.DataType.INT64, name=f"{node.outputs[0].name}_shape"),
        )
        model.graph.register_initializer(shape)
        node.replace_input_with(1, shape)
        node.attributes.pop("allowzero", None)  # here 0 means "copy"
        folded += 1
    _drop_unused(model.graph)
    return folded


def _drop_unused(graph: ir.Graph) -> None:
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def check_precision(model: ir.Model, recipe: Recipe, islands: list[str]) -> None:
    """Compare the typed graph with its recipe: float32 only at the edges and in its islands.

    Args:
        model: exported graph.
        recipe: its recipe.
        islands: module paths of the islands, see `precision.apply_precision`.

    Raises:
        ExportError: a float32 computation outside the islands, or an island that was never run.
    """
    if recipe.dtype == "float32":
        return
    unused = set(islands)
    for node in model.graph:
        scopes = _module_paths(node)
        unused.difference_update(scopes)
        wide = any(v.type == ir.TensorType(ir.DataType.FLOAT) for v in node.outputs)
        if wide and node.op_type not in _LAYOUT_OPS and not set(scopes) & set(islands):
            raise ExportError(
                f"{node.name} ({node.op_type} in {scopes[-1]!r}) computes in float32 outside the "
                f"fp32_islands of {recipe.precision}.toml"
            )
    if unused:
        raise ExportError(
            f"{recipe.precision}.toml: island {min(unused)} is never run as a module, so it cannot "
            "be kept in float32; name a module around it"
        )


def _module_paths(node: ir.Node) -> list[str]:
    """Paths of the modules a node was traced in, outermost ("") first."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "['']"))
    return [str(scope) for scope in scopes]


def check_onnx(path: Path, spec: GraphSpec) -> None:
    """Check a file with onnx's checker and shape inference, and its inputs and outputs.

    Raises:
        ExportError: invalid, or names, dtypes or axes differ from the contract.
    """
    check_valid(path)
    graph = onnx.load(path, load_external_data=False).graph
    for values, tensors in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
        found = [
            (
                value.name,
                onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
            )
            for value in values
        ]
        wanted = [(t.name, t.dtype, t.axes) for t in tensors]
        if found != wanted:
            raise ExportError(f"{path.name}: has {found}, the contract says {wanted}")
    if shapes := [node.name for node in graph.node if node.op_type == "Shape"]:
        raise ExportError(f"{path.name}: shapes are computed at run time by {shapes[:4]}")
