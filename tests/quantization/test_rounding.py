"""Rounding of weights by what it does to a layer's output."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support.fusions import run_onnx

from dbsam_deploy.core.errors import ExportError
from dbsam_deploy.quantization.layers import find_layers
from dbsam_deploy.quantization.qdq import calibrate, place_pairs, quantize_graph
from dbsam_deploy.quantization.rounding import (
    LEVELS,
    ROWS,
    Moments,
    round_layers,
    round_rows,
    use_codes,
)
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions.cpu_graph import cpu_graph

PLAN = load_recipe("int8").quantization


def correlated(rows, inputs, rng):
    """Inputs that go together, as a network's do, with a mean."""
    mixed = rng.standard_normal((rows, inputs)) @ rng.standard_normal((inputs, inputs))
    return (mixed * rng.uniform(0.1, 3, inputs) + rng.standard_normal(inputs)).astype(np.float32)


def output_error(weights, codes, values):
    step = np.abs(weights).max(1, keepdims=True) / LEVELS
    return np.square(values @ (weights - codes * step).T).sum()


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 257), (33, 128), (5, 96), (1, 64)])
def test_outputs_come_closer_than_by_rounding_to_the_nearest(outputs, inputs):
    rng = np.random.default_rng()
    ratios = []
    for _ in range(40):  # one draw of a single output lies anywhere between 0.2 and 0.9
        weights = rng.standard_normal((outputs, inputs))
        seen, unseen = np.split(correlated(8 * inputs, inputs, rng), 2)
        codes = round_rows(weights, seen.T @ seen)
        assert codes.dtype == np.int8
        assert np.abs(codes).max() <= LEVELS
        nearest = np.round(weights / (np.abs(weights).max(1, keepdims=True) / LEVELS))
        found = (output_error(weights, chosen, unseen) for chosen in (codes, nearest))
        ratios.append(next(found) / next(found))
    assert np.mean(ratios) < 0.6  # on inputs that were not seen; 0.42 ± 0.02 over many runs


def test_inputs_that_do_not_go_together_are_rounded_to_the_nearest():
    weights = np.random.default_rng().standard_normal((6, 200))
    step = np.abs(weights).max(1, keepdims=True) / LEVELS
    codes = round_rows(weights, np.diag(np.linspace(1, 9, 200)).astype(np.float32))
    np.testing.assert_array_equal(codes, np.round(weights / step))


def test_dead_channels_and_inputs_keep_to_numbers():
    rng = np.random.default_rng()
    weights = rng.standard_normal((4, 140))
    weights[1] = 0
    values = correlated(300, 140, rng)
    values[:, 100:] = 0
    codes = round_rows(weights, values.T @ values)
    assert not codes[1].any()
    nearest = np.round(weights / (np.abs(weights).max(1, keepdims=True) + 1e-30) * LEVELS)
    np.testing.assert_array_equal(codes[:, 100:], nearest[:, 100:])
    np.testing.assert_array_equal(codes, round_rows(weights, values.T @ values))
    assert np.isfinite(round_rows(weights, np.zeros((140, 140), np.float32))).all()


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((9, 7), {"kernel_size": 3, "padding": 1}),
        ((11, 8), {"kernel_size": 3, "stride": 2}),
        ((8, 8), {"kernel_size": (2, 3), "padding": (0, 2), "dilation": (2, 1)}),
        ((5, 6), {"kernel_size": 1}),
    ],
)
def test_windows_of_a_convolution_are_those_of_unfold(traced, size, options):
    values = torch.randn(1, 5, *size)
    module = torch.nn.Conv2d(5, 4, **options)
    model = traced(module, {"input": values.repeat(2, 1, 1, 1)})
    (layer,) = find_layers(model, ("Conv",))
    moments = Moments(model, [layer], seed=0)
    moments.add({layer.source: values.numpy()})
    moments.add({layer.source: values.numpy()})
    full = {
        name: options.get(name, d) for name, d in (("padding", 0), ("stride", 1), ("dilation", 1))
    }
    rows = torch.nn.functional.unfold(values, options["kernel_size"], **full)[0].T.numpy()
    assert len(rows) < ROWS
    np.testing.assert_allclose(moments.of(layer), 2 * rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_rows_are_drawn_where_there_are_many(traced):
    module = torch.nn.Linear(6, 3)
    values = torch.randn(2, 1500, 6)
    model = traced(module, {"input": values})
    layers = find_layers(model, ("MatMul", "Gemm"))
    assert layers
    moments = [Moments(model, layers, seed=0) for _ in range(2)]
    for found in moments:
        found.add({layers[0].source: values.numpy()})
    first, second = (found.of(layers[0]) for found in moments)
    np.testing.assert_array_equal(first, second)
    mean = np.trace(first) / ROWS
    assert abs(mean - 6) < 1.5  # unit variance, six inputs
    with pytest.raises(ExportError, match="rounding needs calibration images"):
        Moments(model, layers, seed=0).of(layers[0])


@pytest.fixture
def graph(traced, tmp_path):
    """File of Linear, Linear, Conv with a calibration feed."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(48, 96), torch.nn.Linear(96, 48)
            self.c = torch.nn.Conv2d(48, 24, 3, padding=1)

        def forward(self, x):
            x = torch.tanh(self.b(torch.relu(self.a(x))))
            return self.c(x.transpose(1, 2).unflatten(2, (12, 12)))

    rng = np.random.default_rng()
    feeds = [{"x": part[None]} for part in np.split(correlated(6 * 144, 48, rng) / 20, 6)]
    path = tmp_path / "net.onnx"
    onnx.save(traced(Net(), {"x": torch.from_numpy(np.repeat(feeds[0]["x"], 2, 0))}), path)
    return path, feeds


def test_a_quantised_graph_has_the_codes_and_is_closer(graph, tmp_path):
    path, feeds = graph
    model = onnx.load(path)
    reference = run_onnx(model, feeds[-1])[0]
    errors = {}
    for rounding in ("nearest", "gptq"):
        kinds = {"weights_only": ("*",), "exclude": ("b", "c"), "recentre": False}
        plan = replace(PLAN, rounding=rounding, **kinds)
        ready = calibrate(path, plan, lambda: feeds[:-1], tmp_path)
        assert len(ready.codes) == (0 if rounding == "nearest" else 1)
        found = quantize_graph(ready, plan, tmp_path / f"{rounding}.onnx")
        # as it is, ONNX Runtime would round the inputs of such a layer as well
        (values,) = run_onnx(cpu_graph(onnx.load(found.path)), feeds[-1])
        errors[rounding] = np.linalg.norm(values - reference)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(found.path).graph.initializer}
    for name, codes in ready.codes.items():
        np.testing.assert_array_equal(tensors[f"{name}_quantized"], codes)
    assert errors["gptq"] < 0.7 * errors["nearest"]


def test_codes_of_another_scale_are_refused(graph, tmp_path):
    path, feeds = graph
    plan = replace(PLAN, exclude=(), recentre=False)
    ready = calibrate(path, plan, lambda: feeds, tmp_path)
    model = onnx.load(path)
    placed = place_pairs(model, list(ready.layers), plan, ready.thresholds)
    for tensor in model.graph.initializer:
        if tensor.name in ready.codes:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 2, tensor.name))
    with pytest.raises(ExportError, match="largest magnitude / 127"):
        use_codes(placed, model, ready.codes)


def test_a_weight_with_two_readers_is_left_to_the_tool(graph):
    path, _ = graph
    model = onnx.load(path)
    layers = find_layers(model, ("MatMul", "Gemm", "Conv"))
    extra = onnx.helper.make_node("Identity", [layers[0].weight], ["again"])
    model.graph.node.append(extra)
    moments = Moments(model, layers[1:], seed=0)
    seen = {layer.source: np.ones((1, 4, 96), np.float32) for layer in layers[1:2]}
    seen[layers[2].source] = np.ones((1, 48, 12, 12), np.float32)
    moments.add(seen)
    assert layers[0].weight not in round_layers(model, layers, moments)


def test_progress_is_told_for_each_layer(graph, tmp_path):
    path, feeds = graph
    told = []
    calibrate(
        path,
        replace(PLAN, exclude=("b",)),
        lambda: feeds,
        tmp_path,
        progress=lambda *step: told.append(step),
    )
    texts, done, totals = zip(*told, strict=True)
    assert texts == ("rounding a", "rounding c", "rounded")
    assert done == (0, 1, 2)
    assert set(totals) == {2}
