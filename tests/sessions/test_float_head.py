"""What a recipe left in float, as graphs of their own."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from support.fusions import run_onnx

from dbsam_deploy.core.contract import GraphSpec, TensorSpec
from dbsam_deploy.quantization.qdq import calibrate, quantize_graph
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions.float_head import split_graph

PLAN = load_recipe("int8").quantization
SPEC = GraphSpec(
    "encoder",
    (TensorSpec("x", np.dtype(np.float32), ("batch", 3, 16, 16), ""),),
    (TensorSpec("out", np.dtype(np.float32), ("batch", 8, 16, 16), ""),),
)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.branch = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 3, padding=1)
        self.body, self.after = torch.nn.Conv2d(8, 8, 1), torch.nn.Conv2d(8, 8, 1)
        self.out = torch.nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + torch.tanh(self.branch(x))
        return self.out(self.after(torch.relu(self.body(x))) + x)


@pytest.fixture
def quantized(traced, tmp_path):
    feed = {"x": np.random.default_rng().standard_normal((2, 3, 16, 16), np.float32)}
    path = tmp_path / "net.onnx"
    onnx.save(traced(Net(), {"x": torch.from_numpy(feed["x"])}), path)

    def build(*exclude):
        plan = replace(PLAN, exclude=exclude)
        ready = calibrate(path, plan, lambda: [feed], tmp_path)
        return onnx.load(quantize_graph(ready, plan, tmp_path / "q.onnx").path)

    return build, onnx.load(path), feed


def _convolutions(parts):
    return [sum(n.op_type == "Conv" for n in part.graph.graph.node) for part in parts]


def _run(parts, feed):
    values = dict(feed)
    for part in parts:
        given = {value.name: values[value.name] for value in part.graph.graph.input}
        names = [value.name for value in part.graph.graph.output]
        values |= dict(zip(names, run_onnx(part.graph, given), strict=True))
    return values[names[0]]


def test_the_parts_in_a_row_are_the_whole(quantized):
    build, _, feed = quantized
    model = build("*stem*", "*branch*")
    before = model.SerializeToString(deterministic=True)
    parts = split_graph(model, SPEC)
    assert model.SerializeToString(deterministic=True) == before
    assert [part.lowered for part in parts] == [False, True]
    assert _convolutions(parts) == [2, 3]  # the residual ends before the first quantised layer
    assert not [n for n in parts[0].graph.graph.node if "Quantize" in n.op_type]
    np.testing.assert_array_equal(_run(parts, feed), run_onnx(model, feed)[0])


def test_a_residual_is_not_cut(quantized):
    build, _, _ = quantized
    assert _convolutions(split_graph(build("*stem*"), SPEC)) == [1, 4]


def test_what_is_left_in_float_behind_quantised_layers_stays_so(quantized):
    build, _, feed = quantized
    model = build("*out*")
    parts = split_graph(model, SPEC)
    assert [part.lowered for part in parts] == [True, False]
    assert _convolutions(parts) == [4, 1]
    np.testing.assert_array_equal(_run(parts, feed), run_onnx(model, feed)[0])


def test_a_float_layer_beside_a_quantised_one_is_rounded_with_it(quantized):
    build, _, _ = quantized
    assert _convolutions(split_graph(build("*stem*", "*after*"), SPEC)) == [1, 4]


def test_nothing_to_split(quantized):
    build, original, _ = quantized
    for model in (original, build()):
        (part,) = split_graph(model, SPEC)
        assert part.lowered
        assert len(part.graph.graph.node) == len(model.graph.node)
