"""Engines on a real GPU: built, verified against PyTorch, and the same from one run to the next.

What the tests with plugins count is held against the graph, and against a played inspector, on any
machine.
"""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.references import check_close

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.engines.build import EngineOptions, build_engines, check_options
from dbsam_deploy.engines.device import find_gpu
from dbsam_deploy.engines.kinds import TENSORRT, TENSORRT_RTX
from dbsam_deploy.engines.layers import PlacedAttention, check_plugins, read_attention, read_layers
from dbsam_deploy.engines.manifest import Flags, engine_folder
from dbsam_deploy.engines.process import describe_builder
from dbsam_deploy.kernels.plugin_build import build_plugins
from dbsam_deploy.model.weights import load_model
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions.engine_session import TensorrtRtxSession, TensorrtSession
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.sessions.pytorch_session import PytorchSession
from dbsam_deploy.verification.cases import bundled_examples, load_cases
from dbsam_deploy.verification.engine_parity import verify_engines

OPERATORS = {"MsDeformAttn": 8, "ChannelAttention": 4, "RelPosAttention": 8}
"""Fused nodes of `db_sam_tiny`'s encoder."""
WITHOUT_LIBRARY = {"MsDeformAttn": 8, "RelPosAttention": 8}
"""Those that have a quickly deployable plugin; the others are taken apart."""
SESSIONS = {TENSORRT.name: TensorrtSession, TENSORRT_RTX.name: TensorrtRtxSession}


def check_layers(report: dict[str, Any], expected: dict[str, int], encoder: Path) -> None:
    """Every fused node that has a plugin is a plugin layer, and no other layer is one."""
    found = read_attention(encoder)
    assert Counter(found.operators.values()) == OPERATORS
    assert report["operators"] == report["plugins"] == sum(expected.values())
    assert report["attention"] == found.softmax
    assert report["layers"] > report["plugins"]


def played(attention: PlacedAttention, operators: dict[str, int], missing: int = 0) -> str:
    """An inspector's answer with a plugin layer for each node of `operators`, but for some."""
    nodes = [name for name, operator in attention.operators.items() if operator in operators]
    plugins = [{"Name": name, "LayerType": "PluginV3"} for name in nodes[missing:]]
    return json.dumps({"Layers": [*plugins, {"Name": "gemm", "LayerType": "gemm"}]})


@pytest.mark.parametrize("expected", [OPERATORS, WITHOUT_LIBRARY], ids=["library", "quick"])
def test_a_fused_node_without_its_plugin_layer_is_noticed(expected, published_export):
    _, published = published_export
    encoder = published.artefact.path("encoder")
    whole = read_attention(encoder)
    attention = whole if expected is OPERATORS else whole.of_quick_plugins()
    report = read_layers(played(attention, expected), attention)
    check_layers(report.as_dict(), expected, encoder)
    check_plugins(report, "encoder")
    fewer = read_layers(played(attention, expected, missing=1), attention)
    with pytest.raises(EngineError, match="plugin layers for"):
        check_plugins(fewer, "encoder")
    with pytest.raises(AssertionError):
        check_layers(fewer.as_dict(), expected, encoder)


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize("expected", [OPERATORS, WITHOUT_LIBRARY], ids=["library", "quick"])
def test_an_engine_runs_the_plugins_of_all_its_fused_nodes(expected, published_export, tmp_path):
    _, published = published_export
    shutil.copytree(published.artefact.folder, tmp_path / "fp16")
    artefact = replace(published.artefact, folder=tmp_path / "fp16")
    quick = expected is WITHOUT_LIBRARY
    options = EngineOptions(TENSORRT, flags=Flags(quick_plugins=quick))
    if not quick:
        folder = tmp_path / "plugins"
        made = build_plugins(folder, architectures=(find_gpu().target,), report=print)
        options = replace(options, plugins=made.path)
    records = build_engines(artefact, check_options(options))
    check_layers(records["encoder"].layers, expected, artefact.path("encoder"))
    assert (records["encoder"].plugins is None) == quick
    there = [path.name for path in engine_folder(artefact, TENSORRT).glob("*.so")]
    assert there == ([] if quick else ["libdbsam_plugins.so"])
    recipe = load_recipe("fp16")
    cases = load_cases(bundled_examples(), recipe.parity)
    reference = PytorchSession(load_model(image_size=256).model)
    signed = verify_engines(artefact, TENSORRT, reference, cases, recipe.gate)
    check_layers(signed["encoder"].layers, expected, artefact.path("encoder"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(TENSORRT, marks=pytest.mark.trt, id="tensorrt"),
        pytest.param(TENSORRT_RTX, marks=pytest.mark.rtx, id="tensorrt-rtx"),
    ],
)
def test_engines_of_db_sam_tiny_pass_their_gate_and_repeat_themselves(
    kind, published_export, tmp_path
):
    _, published = published_export
    shutil.copytree(published.artefact.folder, tmp_path / "fp16")
    artefact = replace(published.artefact, folder=tmp_path / "fp16")
    gpu = find_gpu()
    if kind.ahead_of_time and gpu.target not in describe_builder(kind).targets:
        pytest.skip(f"{kind.title} does not build for {gpu.target}")
    build_engines(artefact, check_options(EngineOptions(kind, take_apart=True)))
    recipe = load_recipe("fp16")
    cases = load_cases(bundled_examples(), recipe.parity)
    reference = PytorchSession(load_model(image_size=256).model)
    records = verify_engines(artefact, kind, reference, cases, recipe.gate)
    assert all(record.layers["layers"] > 0 for record in records.values())

    session, onnxruntime = SESSIONS[kind.name](artefact), OnnxRuntimeSession(artefact)
    rng = np.random.default_rng(0)
    embeddings = onnxruntime.run("encoder", {"image": rng.random((1, 3, 256, 256), np.float32)})
    for boxes in (3, 3, 3, 3, 40, 3, 256, 3, 3, 3):  # plain, recorded, replayed, grown, again
        corners = rng.random((1, boxes, 2), np.float32) * 128
        feed = {**embeddings, "boxes": np.concatenate([corners, corners + 100], -1)}
        wanted = onnxruntime.run("decoder", feed)
        for name, value in session.run("decoder", feed).items():
            check_close(value, wanted[name], "float16", name)
    session.close()
