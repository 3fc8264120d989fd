"""For tests: what a fusion must keep, and what it must leave alone, on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy.typing as npt
import onnx
import onnx.inliner
import onnx_ir as ir
from onnx import helper, numpy_helper
from support.references import check_close

from dbsam_deploy.core.errors import AccuracyError
from dbsam_deploy.fusions import fuse
from dbsam_deploy.fusions.nodes import PLUGIN

Feed = dict[str, npt.NDArray[Any]]


def run_onnx(model: onnx.ModelProto, feed: Feed) -> list[npt.NDArray[Any]]:
    """A graph's outputs on ONNX Runtime's CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)


def run_body(
    body: ir.Function, inputs: list[npt.NDArray[Any]], attributes: dict[str, Any], rank: int = 3
) -> list[npt.NDArray[Any]]:
    """A function body as the only node of a graph, checked and run.

    Args:
        body: a fused op in standard ops, whose outputs have as many axes as `rank` says.
        inputs: in its order, of one dtype; the first axis is dynamic in the graph.
        attributes: of the node, without those that name the plugin.
        rank: of the outputs.
    """
    function = ir.to_proto(body)
    element = helper.np_dtype_to_tensor_dtype(inputs[0].dtype)
    names, outputs = list(function.input), list(function.output)
    node = helper.make_node(body.name, names, outputs, domain=body.domain, **attributes, **PLUGIN)
    graph = helper.make_graph(
        [node],
        body.name,
        [
            helper.make_tensor_value_info(name, element, [None, *x.shape[1:]])
            for name, x in zip(names, inputs, strict=True)
        ],
        [helper.make_tensor_value_info(name, element, [None] * rank) for name in outputs],
    )
    model = helper.make_model(
        graph,
        functions=[function],
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(body.domain, 1)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return run_onnx(model, dict(zip(names, inputs, strict=True)))


def check_fusion(
    model: onnx.ModelProto, feed: Feed, dtype: str, optional: Collection[str] = ()
) -> ir.Model:
    """Fuse a copy of a graph that has one pattern, and compare the values before and after.

    Args:
        model: the graph.
        feed: its inputs.
        dtype: key of the tolerance.
        optional: see `fuse`.

    Returns:
        The fused copy.

    Raises:
        AccuracyError: other values, or not one fused node.
    """
    fused = ir.from_proto(model)
    counts = fuse(fused, optional)
    if sum(counts.values()) != 1:
        raise AccuracyError(f"fused {counts}, expected one node")
    after = ir.to_proto(fused)
    onnx.checker.check_model(after, full_check=True)
    (expected,) = run_onnx(model, feed)
    for proto in (after, onnx.inliner.inline_local_functions(after)):
        (found,) = run_onnx(proto, feed)
        if found.dtype != expected.dtype:
            raise AccuracyError(f"fused output is {found.dtype}, expected {expected.dtype}")
        check_close(found, expected, dtype)
    return fused


def unfused_when_changed(
    model: onnx.ModelProto, feed: Feed, dtype: str, optional: Collection[str] = ()
) -> set[str]:
    """Change one number of a graph at a time: it is left alone, or fused with that number.

    Args:
        model: a graph with one pattern.
        feed: its inputs.
        dtype: key of the tolerance.
        optional: see `fuse`.

    Returns:
        The constants and attributes whose change made the graph another computation.

    Raises:
        AccuracyError: a changed graph was fused to something else.
    """
    left = set()
    for name, changed in _changed_by_one(model):
        fused = ir.from_proto(changed)
        if any(fuse(fused, optional).values()):
            (found,), (expected,) = run_onnx(ir.to_proto(fused), feed), run_onnx(changed, feed)
            check_close(found, expected, dtype, name)
        else:
            left.add(name)
    return left


def _changed_by_one(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The graphs that differ in one number: of a constant (its last), or of an attribute."""
    for index, tensor in enumerate(model.graph.initializer):
        values = numpy_helper.to_array(tensor).copy()
        values.flat[-1] += 1
        changed = onnx.ModelProto.FromString(model.SerializeToString())
        changed.graph.initializer[index].CopyFrom(numpy_helper.from_array(values, tensor.name))
        yield tensor.name, changed
    for index, node in enumerate(model.graph.node):
        for place, attribute in enumerate(node.attribute):
            changed = onnx.ModelProto.FromString(model.SerializeToString())
            if _change(changed.graph.node[index].attribute[place]):
                yield f"{node.op_type} {node.output[0]} {attribute.name}", changed


def _change(attribute: onnx.AttributeProto) -> bool:
    """Change an attribute's number, the last of several; False if it has none."""
    if attribute.name == "perm":
        attribute.ints[-2:] = list(reversed(attribute.ints[-2:]))
    elif attribute.ints:
        attribute.ints[-1] += 1
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i += 1
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f *= 2
    else:
        return False
    return True
