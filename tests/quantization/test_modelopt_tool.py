"""Q/DQ by nvidia-modelopt: its interface with a stand-in, its pairs by the real one."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.fusions import run_onnx

from dbsam_deploy.core.errors import EngineError, ExportError, InputError, MissingError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.extras import pip_line
from dbsam_deploy.fusions import expected_counts, fuse_file
from dbsam_deploy.quantization import modelopt_tool
from dbsam_deploy.quantization.layers import find_layers, is_excluded
from dbsam_deploy.quantization.modelopt_tool import (
    PYTHON_VARIABLE,
    check_modelopt,
    find_python,
    place_modelopt_pairs,
)
from dbsam_deploy.quantization.qdq import calibrate, place_pairs, quantize_graph
from dbsam_deploy.quantization.quantizer import Quantizer
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.verification.parity import cosine

HOW = Preprocessing(64)
REACH = {"int8": 127, "fp8": 127 / 448 * 127}
"""Code of the largest magnitude. Of E4M3's 448, modelopt uses 36: it clips nothing."""


def plan_of(precision="int8", calibrator="max", **changes):
    found = load_recipe(precision).quantization
    how = found.calibration and replace(found.calibration, calibrator=calibrator)
    plain = {"rounding": "nearest", "recentre": False}
    return replace(found, tool="modelopt", calibration=how, **plain, **changes)


@pytest.fixture
def graph(encoder, tmp_path):
    """A copy of the float encoder, beside which a log may be left."""
    return Path(shutil.copy(encoder(), tmp_path / "encoder.onnx"))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Shell lines → they run instead of the Python that has modelopt; `$4` is the job's file."""

    def name(*lines):
        path = tmp_path / "python"
        path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
        path.chmod(0o755)
        monkeypatch.setenv(PYTHON_VARIABLE, str(path))
        return path

    return name


def place(graph, feed, nodes=("node_conv2d",), plan=None):
    return place_modelopt_pairs(graph, nodes, plan or plan_of(), [feed])


@pytest.mark.parametrize("calibrator", ["percentile", "mse"])
def test_calibrators_that_modelopt_has_not_are_refused(calibrator):
    with pytest.raises(InputError, match=f"'{calibrator}': modelopt has max and entropy; set one"):
        check_modelopt(plan_of(calibrator=calibrator))


def test_plans_that_modelopt_cannot_follow_are_refused():
    with pytest.raises(InputError, match="int8 and fp8, not int8-weights"):
        check_modelopt(plan_of("int8_weights"))
    with pytest.raises(InputError, match=r"outputs = \('Conv',\), expected \[\]"):
        check_modelopt(plan_of(outputs=("Conv",)))


def test_without_modelopt_the_message_names_what_to_do(monkeypatch):
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(modelopt_tool.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError) as caught:
        check_modelopt(plan_of())
    assert caught.value.install == pip_line("modelopt")
    assert PYTHON_VARIABLE in caught.value.what


def test_this_python_is_taken_where_it_has_modelopt_and_none_is_named(monkeypatch):
    monkeypatch.setattr(modelopt_tool.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    assert find_python() == sys.executable
    monkeypatch.setenv(PYTHON_VARIABLE, "/bin/sh")
    assert find_python() == "/bin/sh"


def test_a_named_python_must_be_a_program(monkeypatch, tmp_path):
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "python"))
    with pytest.raises(EngineError, match="no program; name the python of an environment"):
        find_python()


def test_an_export_refuses_before_it_starts(monkeypatch, tmp_path):
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "python"))
    recipe = load_recipe("int8")
    for plan, error in ((plan_of(calibrator="mse"), InputError), (plan_of(), EngineError)):
        with pytest.raises(error, match="modelopt"):
            Quantizer.of(None, replace(recipe, quantization=plan), None, None, None)


def test_the_job_says_all_that_the_worker_needs(graph, feed, stand_in, tmp_path):
    stand_in(f'cp -r "$(dirname "$4")" "{tmp_path}/seen"', "exit 1")
    model = onnx.load(graph)
    nodes = [layer.node for layer in find_layers(model, ("MatMul", "Conv"))][:3]
    with pytest.raises(EngineError):
        place(graph, feed, nodes, plan_of("int8", "entropy"))
    job = json.loads((tmp_path / "seen/job.json").read_text())
    assert (job["format"], job["calibrator"]) == ("int8", "entropy")
    assert job["operators"] == ["MatMul", "Gemm", "Conv"]
    given = onnx.load(tmp_path / "seen/graph.onnx")
    old, new = ([node.name for node in m.graph.node] for m in (model, given))
    assert job["nodes"] == [new[old.index(name)] for name in nodes]
    # modelopt compares beginnings of names: none may be the beginning of another.
    assert len(set(new)) == len(new)
    assert len({len(name) for name in new}) == 1
    (image,) = (tmp_path / "seen/images").iterdir()
    np.testing.assert_array_equal(np.load(image, allow_pickle=False)["image"], feed["image"])


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["echo loading", "echo 'error: No module named modelopt' >&2", "exit 2"], r"\(No module"),
        (["echo one", "echo two", "exit 3"], r"\(its process ended with status 3: one \| two\)"),
        (["kill -9 $$"], r"ended by SIGKILL; its last words: it said nothing"),
        (["exit 0"], r"its process ended with status 0: it said nothing"),
    ],
)
def test_a_failure_ends_in_one_line_and_leaves_its_log(graph, feed, stand_in, lines, expected):
    python = stand_in(*lines)
    with pytest.raises(EngineError, match=expected) as caught:
        place(graph, feed)
    assert "\n" not in caught.value.message
    assert str(python) in caught.value.message
    log = graph.with_suffix(".modelopt.log")
    assert caught.value.details == (f"whole log: {log}",)
    assert {path.name for path in graph.parent.iterdir()} == {graph.name, log.name, python.name}


def test_a_named_file_that_no_system_runs_is_an_error(graph, feed, stand_in):
    stand_in().write_bytes(b"\0")
    with pytest.raises(EngineError, match="does not start"):
        place(graph, feed)


def test_graphs_and_images_that_do_not_fit_are_refused(graph, feed, stand_in):
    stand_in("exit 0")
    with pytest.raises(ExportError, match="fp8 needs opset 19 or later, the graph has 18"):
        place(graph, feed, plan=plan_of("fp8"))
    with pytest.raises(InputError, match="no calibration image"):
        place_modelopt_pairs(graph, ["node_conv2d"], plan_of(), [])
    model = onnx.load(graph)
    model.graph.initializer.append(numpy_helper.from_array(np.float16([1]), "half"))
    onnx.save(model, graph)
    with pytest.raises(InputError, match='is float16; with modelopt use dtype = "float32"'):
        place(graph, feed)


@pytest.fixture(scope="module")
def by_onnxruntime(encoder, feed, tmp_path_factory):
    """Float graph, chosen layers, and the graph that ONNX Runtime's tools make of them."""
    plan = plan_of()
    ready = calibrate(encoder(), plan, lambda: [feed], tmp_path_factory.mktemp("calibrated"))
    model = onnx.load(encoder())
    chosen = [x for x in ready.layers if not is_excluded(x.module, plan.exclude)]
    return model, chosen, place_pairs(model, chosen, plan, ready.thresholds)


def test_pairs_that_are_taken_over_give_the_same_values(by_onnxruntime, feed):
    original, chosen, found = by_onnxruntime
    model = onnx.ModelProto.FromString(original.SerializeToString())
    names = {layer.node: layer.node for layer in chosen}
    assert modelopt_tool._take_pairs(model, found, names, "int8") == set(names)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(run_onnx(model, feed)[0], run_onnx(found, feed)[0])


def test_pairs_that_are_not_what_was_asked_for_are_refused(by_onnxruntime):
    original, chosen, found = by_onnxruntime
    model = onnx.ModelProto.FromString(original.SerializeToString())
    names = {chosen[0].node: chosen[0].node}
    with pytest.raises(ExportError, match="zero point is not of the recipe's format"):
        modelopt_tool._take_pairs(model, found, names, "fp8")
    half = onnx.ModelProto.FromString(found.SerializeToString())
    (node,) = (n for n in half.graph.node if n.name == chosen[0].node)
    node.input[0] = chosen[0].source
    with pytest.raises(ExportError, match="quantised one of its inputs, not both"):
        modelopt_tool._take_pairs(model, half, names, "int8")


@pytest.fixture(scope="module", params=["int8", "fp8"])
def real(request, encoder, feed, tmp_path_factory):
    """Precision, modelopt's result without the MLPs, and the ranges that our observers found."""
    plan = plan_of(request.param)
    folder = tmp_path_factory.mktemp("modelopt")
    source = Path(shutil.copy(encoder(request.param), folder / "encoder.onnx"))
    ready = calibrate(source, plan, lambda: [feed], folder)
    found = quantize_graph(ready, plan, folder / "q.onnx", exclude=("*.mlp.*",))
    assert {path.name for path in folder.iterdir()} == {"encoder.onnx", "q.onnx"}
    return request.param, found, ready


def run_exactly(path, feed):
    """ONNX Runtime without the rule that drops a Relu in front of float8's QuantizeLinear.

    It takes a zero point of zero bits for the least value, as in uint8 (ONNX Runtime 1.32).
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(
        path, providers=["CPUExecutionProvider"], disabled_optimizers=["ReluQuantRewrite"]
    )
    return session.run(None, feed)[0]


@pytest.mark.modelopt
def test_values_stay_close(real, feed):
    _, found, ready = real
    embedding, reference = run_exactly(found.path, feed), run_exactly(ready.path, feed)
    assert embedding.dtype == np.float32
    assert cosine(embedding, reference) >= 0.995
    assert not np.array_equal(embedding, reference)


@pytest.mark.modelopt
def test_only_the_chosen_layers_are_touched(real):
    precision, found, ready = real
    before, after = onnx.load(ready.path), onnx.load(found.path)
    assert list(after.opset_import) == list(before.opset_import)
    pairs = {"QuantizeLinear", "DequantizeLinear"}
    dequantized = {n.output[0] for n in after.graph.node if n.op_type == "DequantizeLinear"}
    kept = [node for node in after.graph.node if node.op_type not in pairs]
    changed = set()
    for old, new in zip(before.graph.node, kept, strict=True):
        if old != new:
            assert set(new.input) - set(old.input) <= dequantized
            changed.add(new.name)
    chosen = {x.node for x in ready.layers if x.module in found.modules}
    assert changed == chosen
    by_hand = [x.module for x in ready.layers if is_excluded(x.module, plan_of(precision).exclude)]
    assert set(by_hand) <= set(found.excluded)
    assert [m for m in found.excluded if ".mlp." in m]
    assert not [m for m in found.modules if ".mlp." in m]
    products = [n for n in kept if n.op_type == "MatMul" and n.name not in chosen]
    assert len(products) > len([x for x in ready.layers if x.module in found.excluded])


@pytest.mark.modelopt
def test_what_modelopt_leaves_out_is_said(real):
    precision, found, ready = real
    wanted = {
        x.module
        for x in ready.layers
        if not is_excluded(x.module, (*plan_of(precision).exclude, "*.mlp.*"))
    }
    left = wanted - set(found.modules)
    dims = {t.name: t.dims for t in onnx.load(ready.path).graph.initializer}
    narrow = {
        x.module
        for x in ready.layers
        if x.op == "Conv" and (min(dims[x.weight][:2]) <= 16 or np.prod(dims[x.weight][2:]) > 32)
    }
    # TensorRT has no kernels for convolutions of few channels or, in fp8, with large windows.
    assert left <= narrow
    assert ("image_encoder.patch_embed.proj" in left) == (precision == "fp8")
    total = sum(x.macs for x in ready.layers)
    share = sum(x.macs for x in ready.layers if x.module in found.modules) / total
    assert found.mac_share == pytest.approx(share)


@pytest.mark.modelopt
def test_weights_are_symmetric_with_a_scale_for_each_output_channel(real):
    precision, found, ready = real
    model, kind = onnx.load(found.path), {"int8": "INT8", "fp8": "FLOAT8E4M3FN"}[precision]
    tensors = {t.name: t for t in model.graph.initializer}
    originals = {t.name: t for t in onnx.load(ready.path).graph.initializer}
    pairs = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    weights = [n for n in pairs if n.input[0] in tensors]
    for node in weights:
        assert tensors[node.input[0]].data_type == getattr(onnx.TensorProto, kind)
        codes, scale, zero = (numpy_helper.to_array(tensors[name]) for name in node.input)
        axis = next(a.i for a in node.attribute if a.name == "axis")
        original = numpy_helper.to_array(originals[node.input[0].removesuffix("_quantized")])
        assert scale.shape == zero.shape == (original.shape[axis],)
        assert not np.asarray(zero, np.float32).any()
        steps = scale.reshape([-1 if i == axis else 1 for i in range(original.ndim)])
        # Half a step of int8; E4M3 rounds to 4 significant bits.
        bound = steps * 0.51
        if precision == "fp8":
            bound = np.maximum(np.abs(original) / 15, steps * 2**-9)
        assert (np.abs(codes.astype(np.float32) * steps - original) <= bound).all(), node.name
    assert len(weights) == len(found.modules)
    assert not {n.input[0].removesuffix("_quantized") for n in weights} & set(tensors)


@pytest.mark.modelopt
def test_ranges_come_from_the_images(real):
    precision, found, ready = real
    model = onnx.load(found.path)
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    pairs = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert pairs
    for node in pairs:
        largest = REACH[precision] * tensors[node.input[1]]
        assert largest == pytest.approx(ready.thresholds[node.input[0]], rel=1e-3)


@pytest.mark.modelopt
def test_the_fusions_find_their_patterns_behind_the_pairs(real, small_models, tmp_path):
    _, found, _ = real
    config = small_models("db_sam_4level").config
    path = Path(shutil.copy(found.path, tmp_path / "fused.onnx"))
    assert fuse_file(path, config, found.modules) == expected_counts(config)
