"""What lies before the first quantised layer, as a graph of its own."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from support.fusions import run_onnx

from dbsam_deploy.core.contract import GraphSpec, TensorSpec
from dbsam_deploy.quantization.qdq import calibrate, quantize_graph
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions.float_head import split_head

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
        self.body, self.out = torch.nn.Conv2d(8, 8, 1), torch.nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + torch.tanh(self.branch(x))
        return self.out(torch.relu(self.body(x)) + x)


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


def test_the_two_parts_in_a_row_are_the_whole(quantized):
    build, _, feed = quantized
    model = build("*stem*", "*branch*")
    before = model.SerializeToString(deterministic=True)
    split = split_head(model, SPEC)
    assert model.SerializeToString(deterministic=True) == before
    count = {
        name: sum(n.op_type == "Conv" for n in part.graph.node)
        for name, part in (("head", split.head), ("rest", split.rest))
    }
    assert count == {"head": 2, "rest": 2}  # the residual ends before the first quantised layer
    assert not [n for n in split.head.graph.node if "Quantize" in n.op_type]
    (between,) = run_onnx(split.head, feed)
    (found,) = run_onnx(split.rest, {split.tensors[0]: between})
    np.testing.assert_array_equal(found, run_onnx(model, feed)[0])


def test_a_residual_is_not_cut(quantized):
    build, _, _ = quantized
    split = split_head(build("*stem*"), SPEC)
    assert sum(n.op_type == "Conv" for n in split.head.graph.node) == 1


def test_nothing_to_split(quantized):
    build, original, _ = quantized
    assert split_head(original, SPEC) is None
    assert split_head(build(), SPEC) is None
