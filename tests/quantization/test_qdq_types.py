"""fp8 and weight-only graphs of one layer, exactly as NumPy computes them."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from support.fusions import run_onnx

from dbsam_deploy.quantization.qdq import calibrate, quantize_graph
from dbsam_deploy.quantization.rounding import round_rows
from dbsam_deploy.recipe import load_recipe


@pytest.fixture
def layer(rng, tmp_path):
    """y = x @ w with a residual x + x beside it, float32 or float16; its file, x and w."""

    def make(kind, opset=19):
        x = rng.standard_normal((5, 16)).astype(kind)
        w = (rng.standard_normal((16, 8)) * np.geomspace(0.01, 10, 8)).astype(kind)
        element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["y"], name="layer"),
            helper.make_node("Add", ["x", "x"], ["twice"], name="residual"),
        ]
        values = [
            helper.make_tensor_value_info(name, element, ["n", size])
            for name, size in (("x", 16), ("y", 8), ("twice", 16))
        ]
        graph = helper.make_graph(
            nodes, "g", values[:1], values[1:], [numpy_helper.from_array(w, "w")]
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9
        )
        onnx.save(model, tmp_path / "float.onnx")
        return tmp_path / "float.onnx", x, w

    return make


def quantised(path, x, precision, **changes):
    plan = replace(load_recipe(precision).quantization, **changes)
    if plan.calibration is not None:
        plan = replace(plan, calibration=replace(plan.calibration, calibrator="max"))
    ready = calibrate(path, plan, lambda: [{"x": x}], path.parent)
    return onnx.load(quantize_graph(ready, plan, path.parent / "q.onnx").path)


def round_e4m3(values, scale):
    scaled = (values / scale).astype(np.float32)
    return scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale.astype(np.float32)


def round_int8(values, scale):
    return np.clip(np.round(values / scale), -127, 127) * scale


@pytest.mark.parametrize(
    ("precision", "largest", "rounded"), [("fp8", 448, round_e4m3), ("int8", 127, round_int8)]
)
def test_a_layer_computes_with_rounded_values_and_its_neighbour_with_the_others(
    layer, precision, largest, rounded
):
    path, x, w = layer(np.float32)
    y, twice = run_onnx(quantised(path, x, precision, rounding="nearest"), {"x": x})
    expected = rounded(x, np.float32(np.abs(x).max() / largest)) @ rounded(
        w, (np.abs(w).max(0) / largest).astype(np.float32)
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(y, x @ w, rtol=1e-3, atol=0)
    np.testing.assert_array_equal(twice, x + x)


def test_int8_computes_with_the_weights_that_gptq_chose(layer):
    path, x, w = layer(np.float32)
    y, _ = run_onnx(quantised(path, x, "int8", rounding="gptq"), {"x": x})
    codes = round_rows(w.T.astype(np.float64), x.T @ x).T
    scale = np.abs(w).max(0) / 127
    assert (codes != np.round(w / scale)).any()
    expected = round_int8(x, np.abs(x).max() / 127) @ (codes * scale)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_fp8_of_a_half_precision_graph_has_half_precision_scales(layer):
    path, x, w = layer(np.float16)
    model = quantised(path, x, "fp8")
    types = {t.data_type for t in model.graph.initializer}
    assert types == {TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN}
    y, _ = run_onnx(model, {"x": x})
    assert y.dtype == np.float16
    wide = x.astype(np.float32), w.astype(np.float32)
    error = np.linalg.norm(y - wide[0] @ wide[1]) / np.linalg.norm(y)
    assert 0.001 < error < 0.06  # E4M3 rounds by up to 2**-4


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_fp8_behind_a_relu_stays_non_negative(rng, tmp_path, kind):
    """ONNX Runtime would drop the Relu; only those in front of a pair are rewritten."""
    x = rng.standard_normal((5, 32)).astype(kind)
    w = rng.standard_normal((32, 7)).astype(kind)
    graph = onnx.parser.parse_graph(
        "g (float[5, 32] x) => (float[5, 7] y, float[5, 32] plain) "
        "{ r = Relu(x) y = MatMul(r, w) p = Neg(x) plain = Relu(p) }".replace(
            "float[", "float16[" if kind is np.float16 else "float["
        )
    )
    graph.node[1].name = "layer"
    graph.initializer.append(numpy_helper.from_array(w, "w"))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    path = tmp_path / "relu.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    found = quantised(path, np.maximum(x, 0), "fp8")
    assert [n.op_type for n in found.graph.node].count("Relu") == 1
    y, plain = run_onnx(found, {"x": x})
    np.testing.assert_array_equal(plain, np.maximum(-x, 0))
    expected = np.maximum(x, 0).astype(np.float32) @ w.astype(np.float32)
    assert np.linalg.norm(y - expected) / np.linalg.norm(expected) < 0.06  # E4M3, as above


def test_weights_alone_are_rounded_and_activations_are_not(layer):
    path, x, w = layer(np.float32)
    model = quantised(path, x, "int8_weights")
    assert [n.op_type for n in model.graph.node if "Linear" in n.op_type] == ["DequantizeLinear"]
    # ONNX Runtime's own optimisation (MatMulNBits) would round the activations, block by block.
    y, _ = ReferenceEvaluator(model).run(None, {"x": x})
    expected = x @ round_int8(w, (np.abs(w).max(0) / 127).astype(np.float32))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_values_beyond_the_range_saturate(layer):
    path, x, w = layer(np.float32)
    for precision in ("int8", "fp8"):
        model = quantised(path, x, precision)
        y, _ = run_onnx(model, {"x": x * 1000})
        assert np.isfinite(y).all()
        limit = np.abs(x).max() * np.abs(w).sum(0) * 1.1
        assert (np.abs(y) <= limit).all()
