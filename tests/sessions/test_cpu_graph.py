"""Quantised graphs in ONNX Runtime's own operators: the same numbers, fewer passes."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from support.fusions import run_onnx
from support.graph_builder import GraphBuilder
from support.references import check_close

from dbsam_deploy.artefact import Artefact, graph_file
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.files.onnx_data import OnnxContent
from dbsam_deploy.sessions.cpu_graph import cpu_graph, is_quantized, read_cpu_graph
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession

WIDTH, TOKENS = 16, 12


class Builder(GraphBuilder):
    """Collects the nodes of a graph with int8 pairs."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def pair(self, x: str, scale: float = 0.02, zero: int = 0) -> str:
        words = (self.constant(np.float32(scale)), self.constant(np.int8(zero)))
        quantized = self.add("QuantizeLinear", x, *words)
        return self.add("DequantizeLinear", quantized, *words)

    def weight(self, *shape: int, axis: int, zero: int = 0) -> str:
        values = self.rng.integers(-127, 128, shape).astype(np.int8)
        scale = self.rng.uniform(0.001, 0.01, shape[axis]).astype(np.float32)
        zeros = np.full(shape[axis], zero, np.int8)
        words = [self.constant(array) for array in (values, scale, zeros)]
        return self.add("DequantizeLinear", *words, axis=axis)

    def vector(self, size: int = WIDTH) -> str:
        return self.constant(self.rng.standard_normal(size).astype(np.float32))

    def model(self, shape: tuple[int | str, ...], *outputs: str) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        anything = [f"d{i}" for i in range(len(shape))]
        ys = [helper.make_tensor_value_info(y, TensorProto.FLOAT, anything) for y in outputs]
        graph = helper.make_graph(self.nodes, "test", [x], ys, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model)
        return model


def tokens(batch: int = 2) -> dict[str, np.ndarray]:
    """Values of which some are beyond the range of int8 at the scale above."""
    return {"x": np.random.default_rng().normal(0, 1.5, (batch, TOKENS, WIDTH)).astype(np.float32)}


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def run_as_it_stands(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs without any optimisation: pairs round, and everything else is float32."""
    onnxruntime = pytest.importorskip("onnxruntime")
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)


def check_same(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Compare with the pairs as they stand, in float32, and return the rewritten graph."""
    expected = run_as_it_stands(model, feed)
    rewritten = cpu_graph(copy.deepcopy(model))
    for found, truth in zip(run_onnx(rewritten, feed), expected, strict=True):
        check_close(found, truth, "float32 kernel")
    return rewritten


@pytest.mark.parametrize("bias_first", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_linear_layer_becomes_one_operator(batch: int, bias_first: bool) -> None:
    build = Builder()
    product = build.add("MatMul", build.pair("x"), build.weight(WIDTH, 8, axis=1))
    words = (build.vector(8), product) if bias_first else (product, build.vector(8))
    build.add("Add", *words, output="y")
    rewritten = check_same(build.model(("batch", TOKENS, WIDTH), "y"), tokens(batch))
    assert operators(rewritten) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}
    assert {t.data_type for t in rewritten.graph.initializer} == {
        TensorProto.UINT8,
        TensorProto.INT8,
        TensorProto.FLOAT,
    }


def test_layers_with_one_input_share_its_quantised_form() -> None:
    build = Builder()
    shared = build.pair("x")
    again = build.pair("x")  # a dedicated pair of the same tensor
    for index, source in enumerate((shared, shared, again)):
        build.add("MatMul", source, build.weight(WIDTH, 8, axis=1), output=f"y{index}")
    rewritten = check_same(build.model(("b", TOKENS, WIDTH), "y0", "y1", "y2"), tokens())
    assert operators(rewritten) == {"QuantizeLinear": 2, "MatMulIntegerToFloat": 3}


def test_a_bias_with_another_reader_of_the_product_stays_an_add() -> None:
    build = Builder()
    product = build.add("MatMul", build.pair("x"), build.weight(WIDTH, WIDTH, axis=1))
    biased = build.add("Add", product, build.vector())
    build.add("Mul", biased, product, output="y")
    rewritten = check_same(build.model(("b", TOKENS, WIDTH), "y"), tokens())
    assert operators(rewritten)["Add"] == 1


def test_a_residual_is_not_taken_for_a_bias() -> None:
    build = Builder()
    product = build.add("MatMul", build.pair("x"), build.weight(WIDTH, WIDTH, axis=1))
    build.add("Add", product, "x", output="y")
    rewritten = check_same(build.model(("b", TOKENS, WIDTH), "y"), tokens())
    assert operators(rewritten) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Add": 1}


@pytest.mark.parametrize("change", ["activation zero point", "weight zero point", "weight axis"])
def test_what_is_not_symmetric_or_per_column_stays(change: str) -> None:
    build = Builder()
    source = build.pair("x", zero=5 if change == "activation zero point" else 0)
    weight = build.weight(
        WIDTH,
        WIDTH,
        axis=0 if change == "weight axis" else 1,
        zero=3 if change == "weight zero point" else 0,
    )
    build.add("MatMul", source, weight, output="y")
    model = build.model(("b", TOKENS, WIDTH), "y")
    rewritten = cpu_graph(copy.deepcopy(model))
    assert list(rewritten.graph.node) == list(model.graph.node)
    assert list(rewritten.graph.initializer) == list(model.graph.initializer)


def test_a_product_of_activations_stays() -> None:
    build = Builder()
    turned = build.add("Transpose", "x", perm=[0, 2, 1])
    build.add("MatMul", build.pair("x"), build.pair(turned), output="y")
    rewritten = check_same(build.model(("b", TOKENS, WIDTH), "y"), tokens())
    assert operators(rewritten)["MatMul"] == 1


def test_a_convolution_reads_what_was_there_before_its_pair() -> None:
    build = Builder()
    weight = build.weight(4, 3, 3, 3, axis=0)
    build.add("Conv", build.pair("x"), weight, build.vector(4), output="y", pads=[1, 1, 1, 1])
    model = build.model(("b", 3, 8, 8), "y")
    feed = {"x": np.random.default_rng().normal(0, 0.5, (2, 3, 8, 8)).astype(np.float32)}
    rewritten = cpu_graph(copy.deepcopy(model))
    assert operators(rewritten) == {"Conv": 1}
    (found,) = run_onnx(rewritten, feed)
    (quantized,) = run_as_it_stands(model, feed)
    dequantize = next(n for n in model.graph.node if n.input[0] == "constant_0")
    values, scale, bias = (
        _constant(model, n) for n in ("constant_0", dequantize.input[1], "constant_5")
    )
    kernel = torch.from_numpy(values * scale[:, None, None, None])
    plain = F.conv2d(torch.from_numpy(feed["x"]), kernel, torch.from_numpy(bias.copy()), padding=1)
    check_close(found, plain.numpy(), "float32 kernel")
    assert not np.allclose(found, quantized, atol=1e-6)


def _constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_alone_become_float_and_inputs_stay_exact(axis: int) -> None:
    """ONNX Runtime's own optimisation would round the inputs, block by block."""
    build = Builder()
    build.add("MatMul", "x", build.weight(WIDTH, 2 * WIDTH, axis=axis), output="y")
    model = build.model(("b", TOKENS, WIDTH), "y")
    feed = tokens()
    rewritten = cpu_graph(copy.deepcopy(model))
    assert operators(rewritten) == {"MatMul": 1}
    (found,) = run_onnx(rewritten, feed)
    (weight,) = (n for n in model.graph.node if n.op_type == "DequantizeLinear")
    values, scale = (_constant(model, name).astype(np.float64) for name in weight.input[:2])
    wide = values * (scale[:, None] if axis == 0 else scale)
    check_close(found, (feed["x"] @ wide).astype(np.float32), "float32 kernel")


def test_a_float_graph_is_left_alone() -> None:
    build = Builder()
    build.add("MatMul", "x", build.constant(np.ones((WIDTH, 4), np.float32)), output="y")
    model = build.model(("b", TOKENS, WIDTH), "y")
    before = model.SerializeToString()
    assert not is_quantized(model)
    assert cpu_graph(model).SerializeToString() == before


def test_the_session_runs_the_rewritten_graph(
    tiny_artefact: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = onnx.load(tiny_artefact.path("encoder"))
    weight = numpy_helper.to_array(source.graph.initializer[0])
    build = Builder()
    step = np.float32(abs(weight).max() / 127)
    rounded = build.constant(np.rint(weight / step).astype(np.int8))
    scales = build.constant(np.full(len(weight), step, np.float32))
    zeros = build.constant(np.zeros(len(weight), np.int8))
    kernel = build.add("DequantizeLinear", rounded, scales, zeros, axis=0)
    strides = list(weight.shape[2:])
    patches = build.add("Conv", build.pair("image", 0.03), kernel, strides=strides)
    build.add("Tanh", patches, output="image_embeddings")
    graph = helper.make_graph(
        build.nodes, "encoder", source.graph.input, source.graph.output, build.constants
    )
    path = tmp_path / "encoder.onnx"
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    how = Preprocessing(tiny_artefact.preprocessing.image_size, "sam")
    graphs = {"encoder": graph_file(path, tmp_path)}
    facts = {"graphs": {"encoder": {}}}
    artefact = Artefact(tmp_path, "tiny", "int8", how, graphs, quantization=facts)
    feed = {"image": np.random.default_rng().normal(0, 1, (1, 3, 128, 128)).astype(np.float32)}
    content = read_cpu_graph(OnnxContent(path.read_bytes()))
    (expected,) = run_onnx(onnx.load_from_string(content.model), feed)
    found = OnnxRuntimeSession(artefact).run("encoder", feed)["image_embeddings"]
    np.testing.assert_array_equal(found, expected)
    (pairs,) = run_onnx(onnx.load(path), feed)
    assert not np.array_equal(found, pairs)
