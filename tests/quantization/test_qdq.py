"""Q/DQ graphs: values, what is touched and what is not, formats, sizes, fusions behind them."""

import functools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.fusions import run_onnx
from support.graph_builder import weight_bytes

from dbsam_deploy.core.errors import ExportError, InputError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.fusions import expected_counts, fuse_file
from dbsam_deploy.quantization.layers import find_layers
from dbsam_deploy.quantization.qdq import (
    Calibrated,
    calibrate,
    place_pairs,
    quantize_graph,
)
from dbsam_deploy.recipe import OPTIONAL_FUSIONS, load_recipe
from dbsam_deploy.verification.parity import cosine

HOW = Preprocessing(64)
PRECISIONS = ("int8", "fp8", "int8_weights")
FLOORS = {"int8": 0.995, "fp8": 0.99, "int8_weights": 0.9995}
"""Cosine with the float graph of an untrained encoder. That each layer rounds as it should is
compared exactly in `test_qdq_types`."""


@pytest.fixture(scope="module")
def calibrated(encoder, feed, tmp_path_factory):
    """precision → the float graph with ranges from one image."""

    @functools.cache
    def run(precision, **changes):
        plan = replace(load_recipe(precision).quantization, **changes)
        folder = tmp_path_factory.mktemp("calibrated")
        return calibrate(encoder(precision), plan, lambda: [feed], folder), plan

    return run


@pytest.fixture(scope="module")
def quantized(calibrated, tmp_path_factory):
    """(precision, changes) → the quantised graph and what it is of; files are not to be changed.

    Ranges and codes do not depend on which layers are `weights_only`.
    """

    @functools.cache
    def run(precision, leave_out=(), weights_only=None, **changes):
        ready, plan = calibrated(precision, **changes)
        if weights_only is not None:
            plan = replace(plan, weights_only=weights_only)
        path = tmp_path_factory.mktemp("quantized") / "q.onnx"
        return quantize_graph(ready, plan, path, exclude=leave_out), ready

    return run


def float_output(encoder, feed, precision="int8"):
    return run_onnx(onnx.load(encoder(precision)), feed)[0]


def consumers(model, op):
    """Operators that read what nodes of `op` write, without the weights' own pairs."""
    weights = {t.name for t in model.graph.initializer}
    written = {
        n.output[0] for n in model.graph.node if n.op_type == op and n.input[0] not in weights
    }
    return {n.op_type for n in model.graph.node if written & set(n.input)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_stay_close_and_files_shrink(quantized, encoder, feed, precision):
    found, _ = quantized(precision)
    (embedding,) = run_onnx(onnx.load(found.path), feed)
    reference = float_output(encoder, feed, precision)
    assert cosine(embedding, reference) >= FLOORS[precision]
    assert not np.array_equal(embedding, reference)
    sizes = weight_bytes(onnx.load(found.path))
    eight = sizes.get("INT8", 0) + sizes.get("FLOAT8E4M3FN", 0)
    original = onnx.load(encoder())
    floats = {layer.weight for layer in find_layers(original, ("MatMul", "Conv"))}
    assert eight > 0.9 * sum(
        np.prod(t.dims) for t in original.graph.initializer if t.name in floats
    )
    assert found.mac_share > 0.9


def test_only_layers_read_rounded_values(quantized):
    found, _ = quantized("int8")
    model = onnx.load(found.path)
    assert consumers(model, "DequantizeLinear") == {"MatMul", "Conv"}
    assert consumers(model, "QuantizeLinear") == {"DequantizeLinear"}
    layers = {m for m in found.modules}
    assert not [m for m in layers if "sampling_offsets" in m or "vit_conv_blocks" in m]
    assert "image_encoder.blocks.0.mlp.lin1" in layers


def test_weights_alone_leave_activations_as_they_are(quantized):
    model = onnx.load(quantized("int8_weights")[0].path)
    assert not [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    pairs = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    weights = {t.name: t for t in model.graph.initializer}
    assert all(weights[n.input[0]].data_type == onnx.TensorProto.INT8 for n in pairs)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_weights_are_symmetric_with_a_scale_for_each_output_channel(quantized, encoder, precision):
    found, ready = quantized(precision, rounding="nearest")
    model = onnx.load(found.path)
    tensors = {t.name: t for t in model.graph.initializer}
    originals = {t.name: numpy_helper.to_array(t) for t in onnx.load(encoder()).graph.initializer}
    checked = 0
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in tensors:
            continue
        codes, scale, zero = (numpy_helper.to_array(tensors[name]) for name in node.input)
        axis = next(a.i for a in node.attribute if a.name == "axis")
        original = originals[node.input[0].removesuffix("_quantized")]
        assert scale.shape == (original.shape[axis],)
        assert not np.asarray(zero, np.float32).any()
        shape = [-1 if i == axis else 1 for i in range(original.ndim)]
        error = np.abs(codes.astype(np.float32) * scale.reshape(shape) - original)
        # Half a step of int8; E4M3 rounds to 4 significant bits.
        bound = scale.reshape(shape) * 0.51
        if precision == "fp8":
            bound = np.maximum(np.abs(original) / 15, scale.reshape(shape) * 2**-9)
        assert (error <= bound).all(), node.name
        checked += 1
    assert checked == len({x.weight for x in ready.layers if x.module in found.modules})


def test_activation_scales_come_from_the_thresholds(calibrated):
    ready, plan = calibrated("int8")
    layer = ready.layers[0]
    model = place_pairs(onnx.load(ready.path), [layer], plan, {layer.source: 12.7})
    (node,) = (n for n in model.graph.node if n.op_type == "QuantizeLinear")
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert node.input[0] == layer.source
    assert tensors[node.input[1]] == pytest.approx(0.1)
    assert tensors[node.input[2]] == 0


def test_quantised_outputs_are_placed_where_the_recipe_says(quantized):
    model = onnx.load(quantized("int8", outputs=("Conv",), rounding="nearest")[0].path)
    producers = {n.output[0]: n.op_type for n in model.graph.node}
    behind = {
        producers.get(n.input[0], "") for n in model.graph.node if n.op_type == "QuantizeLinear"
    }
    assert "Conv" in behind
    assert "MatMul" not in behind


def test_excluded_modules_stay_and_change_the_share(quantized):
    everything, _ = quantized("int8")
    fewer, _ = quantized("int8", leave_out=("*.mlp.*",))
    assert not [m for m in fewer.modules if ".mlp." in m]
    assert set(fewer.excluded) - set(everything.excluded)
    assert fewer.mac_share < everything.mac_share


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_weights_only_layers_read_exact_values_and_are_as_small(
    quantized, encoder, feed, precision
):
    everything, _ = quantized(precision)
    size = everything.path.stat().st_size
    found, ready = quantized(precision, weights_only=("*.mlp.*",))
    model = onnx.load(found.path)
    assert found.weights_only == tuple(m for m in found.modules if ".mlp." in m) != ()
    assert found.mac_share < everything.mac_share
    assert abs(found.path.stat().st_size - size) < 0.01 * size
    written = {n.output[0]: n for n in model.graph.node}
    layers = {layer.node: layer for layer in ready.layers if layer.module in found.modules}
    for node in model.graph.node:
        if node.name not in layers:
            continue
        layer = layers[node.name]
        source = written.get(node.input[0])
        rounded = source is not None and source.op_type == "DequantizeLinear"
        assert rounded == (layer.module not in found.weights_only), layer
        assert written[node.input[1]].op_type == "DequantizeLinear"
    (value,) = run_onnx(model, feed)
    assert cosine(value, float_output(encoder, feed, precision)) >= FLOORS[precision]


def test_nothing_left_or_unknown_tools_are_refused(calibrated, tmp_path):
    ready, plan = calibrated("int8")
    with pytest.raises(ExportError, match="every layer is excluded"):
        quantize_graph(ready, plan, tmp_path / "q.onnx", exclude=("*",))
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="modelopt"):
        quantize_graph(ready, replace(plan, tool="modelopt"), tmp_path / "q.onnx")


def test_fp8_needs_a_new_opset(encoder, calibrated, tmp_path):
    ready, plan = calibrated("int8")
    with pytest.raises(ExportError, match="opset 19 or later, the graph has 18"):
        quantize_graph(
            Calibrated(encoder(), ready.layers, ready.thresholds),
            replace(plan, format="fp8", recentre=False),
            tmp_path / "q.onnx",
        )


def test_smoothing_changes_no_value_of_the_float_graph(calibrated, encoder, feed):
    ready, _ = calibrated("int8", smoothing=0.5, rounding="nearest")
    assert ready.path != encoder()
    (smoothed,) = run_onnx(onnx.load(ready.path), feed)
    np.testing.assert_allclose(smoothed, float_output(encoder, feed), atol=2e-4)
    plain, _ = calibrated("int8", rounding="nearest")
    changed = [n for n in ready.thresholds if ready.thresholds[n] != plain.thresholds[n]]
    assert changed


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_fusions_find_their_patterns_behind_the_pairs(
    quantized, small_models, feed, precision, tmp_path
):
    found, _ = quantized(precision)
    (before,) = run_onnx(onnx.load(found.path), feed)
    config = small_models("db_sam_4level").config
    path = Path(shutil.copy(found.path, tmp_path))
    counts = fuse_file(path, config, found.modules, OPTIONAL_FUSIONS)
    kept = sum(name.endswith(".mlp.dwconv.dwconv") for name in found.modules)
    assert counts == {**expected_counts(config), "depthwise_conv_gelu": 8 - kept}
    (after,) = run_onnx(onnx.load(path), feed)
    # A value on the edge between two codes may take the other one after a reordered addition.
    assert cosine(after, before) > 0.9999


def test_a_quantised_channel_attention_block_stays_as_it_is(quantized, small_models, tmp_path):
    kept = tuple(x for x in load_recipe("int8").quantization.exclude if "vit_conv" not in x)
    leave_out = ("*.vit_conv_blocks.[012].*", "*.se.*")
    found, _ = quantized("int8", leave_out, exclude=kept, rounding="nearest")
    config = small_models("db_sam_4level").config
    expected = {**expected_counts(config), "channel_attention": 3}
    path = Path(shutil.copy(found.path, tmp_path))
    assert fuse_file(path, config, found.modules) == expected
