"""SmoothQuant: same values, ranges moved, and only where every reader is a chosen layer."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.fusions import run_onnx

from dbsam_deploy.quantization.smoothing import smooth, smoothing_scale

C = 6


def graph(rng, *, other_reader=False, shared=False):
    """LayerNorm → Pad → Reshape → two MatMuls, with what must stop the smoothing."""
    arrays = {
        "g": rng.uniform(0.5, 2, C) * np.array([1, 1, 30, 1, 1, 1]),
        "b": rng.standard_normal(C),
        "w1": rng.standard_normal((C, 4)),
        "w2": rng.standard_normal((C, 3)),
    }
    tensors = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in arrays.items()]
    tensors.append(numpy_helper.from_array(np.array([0, 0, 0, 0, 1, 0]), "pads"))
    tensors.append(numpy_helper.from_array(np.array([-1, C]), "rows"))
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g", "b"], ["n"], axis=-1, name="norm"),
        helper.make_node("Pad", ["n", "pads"], ["p"], name="pad"),
        helper.make_node("Reshape", ["p", "rows"], ["r"], name="reshape"),
        helper.make_node("MatMul", ["r", "w1"], ["y1"], name="first"),
        helper.make_node("MatMul", ["n", "w1" if shared else "w2"], ["y2"], name="second"),
    ]
    outputs = ["y1", "y2"]
    if other_reader:
        nodes.append(helper.make_node("Relu", ["n"], ["y3"]))
        outputs.append("y3")
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5, C])]
    out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    body = helper.make_graph(nodes, "g", values, out, tensors)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


LARGEST = {
    "r": np.array([1, 1, 60, 1, 1, 1], np.float32),
    "n": np.array([2, 1, 60, 1, 1, 0], np.float32),
}


def test_outputs_stay_and_the_large_channel_shrinks(rng):
    model, x = graph(rng), rng.standard_normal((1, 5, C)).astype(np.float32)
    before = run_onnx(model, {"x": x})
    old = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}
    assert smooth(model, ["first", "second"], LARGEST, 0.5) == 1
    for a, b in zip(run_onnx(model, {"x": x}), before, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
    new = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    ratio = new["n.smooth1"] / old["g"]
    assert ratio.argmin() == 2
    assert ratio[5] != 1  # r has a value there although n has none
    np.testing.assert_allclose(new["w1"] * ratio[:, None], old["w1"], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"other_reader": True}, ["first", "second"]),
        ({"shared": True}, ["first", "second"]),
        ({}, ["first"]),
    ],
)
def test_it_is_left_alone_where_something_else_would_change(rng, options, layers):
    model = graph(rng, **options)
    before = model.SerializeToString()
    assert smooth(model, layers, LARGEST, 0.5) == 0
    assert model.SerializeToString() == before


def test_scale_follows_the_formula_and_dead_channels_have_one():
    activations, weights = np.array([4.0, 0, 9], np.float32), np.array([1.0, 1, 0], np.float32)
    found = smoothing_scale(activations, weights, 0.5)
    np.testing.assert_allclose(found, [2, 1, 1])
    # alpha 1 makes every channel's range the same
    np.testing.assert_allclose(smoothing_scale(activations, np.ones(3), 1.0)[[0, 2]], [4, 9])


def test_norms_with_one_weight_between_them_are_smoothed_apart(rng):
    """Untrained norms share their ones and zeros in the file."""
    model, x = graph(rng), rng.standard_normal((1, 5, C)).astype(np.float32)
    model.graph.node.append(
        helper.make_node("LayerNormalization", ["x", "g", "b"], ["other"], axis=-1, name="other")
    )
    model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, None))
    before = run_onnx(model, {"x": x})
    assert smooth(model, ["first", "second"], LARGEST, 0.5) == 1
    after = run_onnx(model, {"x": x})
    np.testing.assert_array_equal(after[2], before[2])
    np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-4)
    assert {"g", "n.smooth1"} <= {tensor.name for tensor in model.graph.initializer}
