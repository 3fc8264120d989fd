"""A choice made by putting layers back is the graph that quantising the choice gives."""

import functools
from dataclasses import replace

import numpy as np
import onnx
import pytest
from support.fusions import run_onnx
from support.graph_builder import weight_bytes

from dbsam_deploy.core.imaging import Preprocessing, preprocess
from dbsam_deploy.quantization.put_back import put_back
from dbsam_deploy.quantization.qdq import calibrate, chosen_layers, quantize_graph
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.verification.cases import bundled_examples


@pytest.fixture(scope="module")
def feed():
    (path,) = bundled_examples().glob("*_0e21d7b3eea8.npz")
    return {"image": preprocess(np.load(path)["imgs"].reshape(256, 320, 3), Preprocessing(64))}


@pytest.fixture(scope="module")
def calibrated(float_encoder, feed, tmp_path_factory):
    """(precision, outputs) → the float graph with ranges, its plan, and all of it quantised."""

    @functools.cache
    def run(precision, outputs):
        plan = replace(load_recipe(precision).quantization, outputs=outputs)
        if outputs:  # rounding by error, which takes long, is in the cases without
            plan = replace(plan, rounding="nearest")
        folder = tmp_path_factory.mktemp("calibrated")
        ready = calibrate(float_encoder(precision), plan, lambda: [feed], folder)
        return ready, plan, quantize_graph(ready, plan, folder / "w.onnx").path

    return run


@pytest.mark.parametrize(
    ("precision", "outputs", "exclude"),
    [
        ("int8", (), ("*.mlp.*", "*.neck.0")),
        ("int8", (), ("*.attn.*",)),
        ("int8", ("Conv", "MatMul"), ("*.neck.2", "*.blocks.1.*")),
        ("fp8", (), ("*.attn.*",)),
    ],
)
def test_same_values_and_pairs_as_quantising_the_choice(
    calibrated, feed, tmp_path, precision, outputs, exclude
):
    ready, plan, quantised = calibrated(precision, outputs)
    direct = onnx.load(quantize_graph(ready, plan, tmp_path / "q.onnx", exclude=exclude).path)
    whole = onnx.load(quantised)
    before = whole.SerializeToString(deterministic=True)
    chosen = chosen_layers(ready, plan, exclude)
    assert 0 < len(chosen) < len(chosen_layers(ready, plan))
    found = put_back(whole, onnx.load(ready.path), ready.layers, chosen, plan.outputs)
    assert whole.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(found, full_check=True)
    for op in ("QuantizeLinear", "DequantizeLinear"):
        assert _count(found, op) == _count(direct, op) < _count(whole, op)
    sizes = [weight_bytes(model).get("INT8", 0) for model in (found, direct)]
    assert sizes[0] == sizes[1]
    np.testing.assert_array_equal(run_onnx(found, feed)[0], run_onnx(direct, feed)[0])


def _count(model, op):
    return sum(node.op_type == op for node in model.graph.node)
