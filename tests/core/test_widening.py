"""Graphs in half precision, rewritten for a CPU: the same graph, every float16 a float32."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from dbsam_deploy.core.widening import widened

PARSED = """
<ir_version: 8, opset_import: ["" : 18, "own" : 1]>
agraph (float[N,3] x, bool[1] flag) => (float[N,3] y)
<float[3] weight = {1.5, -0.333251953125, 65504.0}>
{
    half = Cast <to = 10> (x)
    scaled = own.scale (half, weight)
    chosen = If (flag) <
        then_branch = then () => (float16[N,3] a) { a = Add (scaled, weight) },
        else_branch = other () => (float16[N,3] b) { c = Constant <value = float {0.1}> ()
                                                     b = Add (scaled, c) }>
    y = Cast <to = 1> (chosen)
}
<domain: "own", opset_import: ["" : 18]>
scale (p, q) => (r)
{
    one = Constant <value = float {0.2}> ()
    s = Cast <to = 10> (p)
    t = Mul (s, q)
    r = Mul (t, one)
}
"""
"""Its constants become float16 in the test: onnx's parser knows whole numbers of that only."""


def halve(tensor: onnx.TensorProto) -> np.ndarray:
    values = numpy_helper.to_array(tensor).astype(np.float16)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return values.astype(np.float32)


def halves(message) -> list[str]:
    """Where a message still says float16."""
    found = []
    if isinstance(message, onnx.TensorProto) and message.data_type == TensorProto.FLOAT16:
        found.append(message.name)
    if isinstance(message, onnx.AttributeProto) and message.name == "to" and message.i == 10:
        found.append("Cast")
    for descriptor, value in message.ListFields():
        if descriptor.message_type:
            inner = value if hasattr(value, "__len__") else [value]
            found += [name for item in inner for name in halves(item)]
    return found


def test_weights_casts_functions_and_branches_are_widened():
    model = onnx.parser.parse_model(PARSED)
    weight = halve(model.graph.initializer[0])
    one = halve(model.functions[0].node[0].attribute[0].t)
    branches = {attribute.name: attribute.g for attribute in model.graph.node[2].attribute}
    tenth = halve(branches["else_branch"].node[0].attribute[0].t)
    content = model.SerializeToString()
    found = onnx.load_model_from_string(widened(content))
    onnx.checker.check_model(found, full_check=True)
    assert halves(model)
    assert not [name for name in halves(found) if name]
    np.testing.assert_array_equal(numpy_helper.to_array(found.graph.initializer[0]), weight)
    x = np.random.default_rng(0).standard_normal((5, 3), np.float32)
    session = onnxruntime.InferenceSession(found.SerializeToString())
    for flag in (True, False):
        expected = x * weight * one + (weight if flag else tenth)
        (y,) = session.run(None, {"x": x, "flag": np.array([flag])})
        np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("graph", ["encoder", "decoder", "prompt_decoder"])
def test_an_exports_graph_is_valid_and_without_half_precision(half_graphs, graph):
    before = onnx.load(half_graphs / f"{graph}.onnx")
    found = onnx.load_model_from_string(widened((half_graphs / f"{graph}.onnx").read_bytes()))
    onnx.checker.check_model(found, full_check=True)
    assert not halves(found)
    assert [node.op_type for node in found.graph.node] == [n.op_type for n in before.graph.node]
    for wide, half in zip(found.graph.initializer, before.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(wide), numpy_helper.to_array(half))


def test_a_graph_without_half_precision_is_itself(float_graphs):
    content = (float_graphs / "decoder.onnx").read_bytes()
    assert widened(content) is content


def test_a_large_graph_stays_in_half_precision(half_graphs, monkeypatch):
    content = (half_graphs / "decoder.onnx").read_bytes()
    monkeypatch.setattr("dbsam_deploy.core.widening.MOST_BYTES", len(content) - 1)
    assert widened(content) is content


def test_weights_that_are_not_raw_data_are_named():
    half = helper.make_tensor("weight", TensorProto.FLOAT16, [2], [1.0, 2.0])
    assert not half.raw_data
    graph = helper.make_graph([], "g", [], [], [half])
    with pytest.raises(ValueError, match="expected raw data"):
        widened(helper.make_model(graph).SerializeToString())
