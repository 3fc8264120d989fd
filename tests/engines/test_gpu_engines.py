"""Engines on a real GPU: built, verified against PyTorch, and the same from one run to the next."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from support.references import check_close

from dbsam_deploy.engines.build import EngineOptions, build_engines, check_options
from dbsam_deploy.engines.device import find_gpu
from dbsam_deploy.engines.kinds import TENSORRT, TENSORRT_RTX
from dbsam_deploy.engines.process import describe_builder
from dbsam_deploy.model.weights import load_model
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions.engine_session import TensorrtRtxSession, TensorrtSession
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.sessions.pytorch_session import PytorchSession
from dbsam_deploy.verification.cases import bundled_examples, load_cases
from dbsam_deploy.verification.engine_parity import verify_engines

SESSIONS = {TENSORRT.name: TensorrtSession, TENSORRT_RTX.name: TensorrtRtxSession}


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
