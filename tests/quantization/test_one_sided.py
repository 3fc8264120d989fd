"""One-sided activations in the middle of a symmetric range."""

import functools
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support.fusions import run_onnx

from dbsam_deploy.quantization.layers import find_layers
from dbsam_deploy.quantization.one_sided import find_centres
from dbsam_deploy.quantization.qdq import calibrate, quantize_graph
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions.cpu_graph import cpu_graph

INT8 = load_recipe("int8").quantization
PLAN = replace(
    INT8, exclude=(), rounding="nearest", calibration=replace(INT8.calibration, calibrator="max")
)


class Net(torch.nn.Module):
    """GELU → Linear, with another reader of the GELU; tanh → Linear; ReLU → Conv."""

    def __init__(self, bias=True):
        super().__init__()
        self.a, self.b = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32, bias=bias)
        self.c, self.d = torch.nn.Linear(32, 32), torch.nn.Conv2d(32, 8, 1)

    def forward(self, x):
        hidden = torch.nn.functional.gelu(4 * self.a(x))
        y = self.c(torch.tanh(self.b(hidden))) + hidden[..., :32]
        return self.d(torch.relu(y).transpose(1, 2).unflatten(2, (4, 4)))


@pytest.fixture(scope="module")
def draw(traced, tmp_path_factory):
    """`draw(number, bias)` → (file of a float graph with random weights, random feeds)."""

    @functools.cache
    def net(number, bias):
        torch.manual_seed(np.random.default_rng().integers(2**31))
        feeds = [
            {"x": np.random.default_rng().standard_normal((2, 16, 32), np.float32)}
            for _ in range(4)
        ]
        path = tmp_path_factory.mktemp("net") / "net.onnx"
        onnx.save(traced(Net(bias), {"x": torch.from_numpy(feeds[0]["x"])}), path)
        return path, feeds

    return net


@pytest.fixture
def make(draw, tmp_path):
    """`make(**changes)` → (float graph, quantised graph, feed, names of moved tensors)."""

    def build(bias=True, number=0, **changes):
        path, feeds = draw(number, bias)
        plan = replace(PLAN, **changes)
        ready = calibrate(path, plan, lambda: feeds, tmp_path)
        model = onnx.load(quantize_graph(ready, plan, tmp_path / "q.onnx").path)
        moved = [n.input[0] for n in model.graph.node if n.name.endswith(".one_sided")]
        return onnx.load(path), model, feeds[0], moved

    return build


def test_only_what_enters_linear_layers_from_one_side_moves(make):
    original, model, _, moved = make()
    assert len(moved) == 1
    makers = {node.output[0]: node for node in original.graph.node}
    assert makers[moved[0]].op_type in ("Gelu", "Mul")
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    (shift,) = (n for n in model.graph.node if n.name.endswith(".one_sided"))
    (pair,) = (n for n in model.graph.node if n.input[0] == shift.output[0])
    assert pair.op_type == "QuantizeLinear"
    assert not tensors[pair.input[2]].any()  # symmetric
    steps = tensors[shift.input[1]] / tensors[pair.input[1]]
    assert abs(steps - round(float(steps))) < 1e-4
    assert -127 < steps < -60
    # the other reader of the GELU has the original
    readers = [n.op_type for n in model.graph.node if moved[0] in n.input]
    assert readers.count("Add") == 1
    assert len(readers) > 1


def test_the_error_of_a_one_sided_layer_falls(make):
    errors = {}
    for recentre in (False, True):
        rows = []
        for number in range(4):
            changes = {"recentre": recentre, "exclude": ("a", "c", "d")}
            original, model, feed, moved = make(number=number, **changes)
            assert bool(moved) == recentre
            reference = run_onnx(original, feed)[0]
            error = np.linalg.norm(run_onnx(model, feed)[0] - reference)
            rows.append(error / np.linalg.norm(reference))
        errors[recentre] = np.mean(rows)
    assert errors[True] < 0.85 * errors[False]


@pytest.mark.parametrize(
    "changes",
    [
        {"recentre": False},
        {"bias": False},
        {"weights_only": ("*.b", "b")},
        {"outputs": ("MatMul",)},
    ],
)
def test_where_it_does_not_move(make, changes):
    original, model, feed, moved = make(**changes)
    assert moved == []
    reference = run_onnx(original, feed)[0]
    assert np.linalg.norm(run_onnx(model, feed)[0] - reference) < 0.1 * np.linalg.norm(reference)


def test_on_the_cpu_the_shift_is_a_zero_point(make):
    _, model, feed, moved = make()
    expected = run_onnx(model, feed)[0]
    found = cpu_graph(onnx.ModelProto.FromString(model.SerializeToString()))
    assert not [n for n in found.graph.node if n.name.endswith(".one_sided")]
    quantize = [
        n for n in found.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == moved[0]
    ]
    tensors = {t.name: numpy_helper.to_array(t) for t in found.graph.initializer}
    assert len(quantize) == 1
    assert tensors[quantize[0].input[2]].dtype == np.uint8
    assert tensors[quantize[0].input[2]] < 64
    # convolutions read floats there, so the last layer is a step nearer to float
    step = np.abs(expected).max() / 40
    assert np.abs(run_onnx(found, feed)[0] - expected).max() < step


def test_the_condition(draw):
    model = onnx.load(draw(0, True)[0])
    layers = [x for x in find_layers(model, ("MatMul",)) if x.op == "MatMul"]
    thresholds = {x.source: 2.0 for x in layers}
    assert find_centres(model, layers, thresholds, {x.source: -1.0 for x in layers}) == {}
    low = {x.source: -0.2 for x in layers}
    found = find_centres(model, layers, thresholds, low)
    assert set(found) == {x.source for x in layers}
    for centre in found.values():
        assert (centre.middle, centre.half) == pytest.approx((0.9, 1.1))
    one = next(iter(found))
    assert one not in find_centres(model, layers, thresholds, {**low, one: -1.5})
