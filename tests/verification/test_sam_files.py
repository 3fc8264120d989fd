"""SAM's two files of an export, and what a browser's viewer gets of them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.tiny_artefact import in_two_files, make_tiny_artefact

from dbsam_deploy.artefact import find_exports, load_artefact
from dbsam_deploy.core.errors import AccuracyError, InputError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.files import onnx_files
from dbsam_deploy.graphs import sam_graphs
from dbsam_deploy.images.npz_files import read_images
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.verification import sam_files
from dbsam_deploy.verification.cases import bundled_examples
from dbsam_deploy.verification.sam_files import check_sam_files, publish_sam_files
from dbsam_deploy.verification.sam_parity import canvas_of

ROOT = Path(__file__).resolve().parents[2]
FEED = ROOT / "tests" / "support" / "cornerstone_feed.cjs"
BOX = [200.0, 300.0, 700.0, 800.0]
OUTSIDE = [[512.0, 512.0], [100.0, 800.0], [900.0, 200.0]]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Files of a small model of SAM's geometry, beside their export."""
    export = tmp_path_factory.mktemp("build") / "sam"
    return publish_sam_files(make_tiny_artefact(export, image_size=1024), lambda text: None)


def test_the_files_are_published_with_what_they_came_from(published):
    record = json.loads((published / "sam.json").read_text())
    artefact = load_artefact(published.with_name("sam"))
    assert sorted(path.name for path in published.iterdir()) == [
        "decoder.onnx",
        "encoder.onnx",
        "encoder_hwc.onnx",
        "sam.json",
    ]
    assert record["made_from"]["encoder"] == artefact.graphs["encoder"].sha256
    assert record["figures"]["agreement"] > 0.999
    names = [tensor.name for tensor in onnx.load(published / "decoder.onnx").graph.input]
    assert names == [
        *("image_embeddings", "point_coords", "point_labels"),
        *("mask_input", "has_mask_input", "orig_im_size"),
    ]
    assert find_exports(published.parent) == (artefact.folder,), "it is no export"


def test_files_that_differ_are_not_published(tmp_path, monkeypatch):
    export = tmp_path / "lite"
    artefact = make_tiny_artefact(export, image_size=256, mode="lite_medsam", stride=4)
    said = []
    publish_sam_files(artefact, said.append)
    before = (export.with_name("lite_sam") / "sam.json").read_bytes()
    publish_sam_files(artefact, said.append)
    assert said[1] == f"{tmp_path / 'lite_sam'} is up to date"
    monkeypatch.setattr(sam_files, "code_digest", lambda modules: "another")
    monkeypatch.setattr(sam_graphs, "_PROMPTS", sam_graphs._PROMPTS.replace("{scale}", "0.2"))
    with pytest.raises(AccuracyError, match="Nothing was published"):
        publish_sam_files(artefact, said.append)
    assert (export.with_name("lite_sam") / "sam.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lite", "lite_sam"]


def test_damaged_files_are_made_again(tmp_path):
    artefact = make_tiny_artefact(tmp_path / "a", image_size=256, mode="lite_medsam", stride=4)
    folder = publish_sam_files(artefact, lambda text: None)
    whole = (folder / "decoder.onnx").read_bytes()
    (folder / "decoder.onnx").write_bytes(whole[:-1])
    publish_sam_files(artefact, lambda text: None)
    assert (folder / "decoder.onnx").read_bytes() == whole


def test_weights_in_a_file_of_their_own_stay_so(tmp_path, monkeypatch):
    artefact = make_tiny_artefact(tmp_path / "a", image_size=256, mode="lite_medsam", stride=4)
    large = in_two_files(artefact, tmp_path / "large", monkeypatch)
    monkeypatch.setattr(onnx_files, "ONE_FILE_BYTES", 100)
    folder = publish_sam_files(large, lambda text: None)
    stems = ("decoder", "encoder", "encoder_hwc")
    names = {f"{stem}.onnx{end}" for stem in stems for end in ("", ".data")}
    assert {path.name for path in folder.iterdir()} == {*names, "sam.json"}
    said = []
    publish_sam_files(large, said.append)
    assert said == [f"{folder} is up to date"]


@pytest.mark.parametrize(
    ("how", "precision", "message"),
    [
        (Preprocessing(512), "fp32", "image size 512 with sam preprocessing: expected 1024"),
        (
            Preprocessing(512, "lite_medsam", embedding_stride=4),
            *("fp32", "logits of 512 pixels: expected 256"),
        ),
        (Preprocessing(1024, "medsam"), "int8", "--precision int8: expected fp32 or fp16"),
        (Preprocessing(1024), "fp32", "holds no files in SAM's signature"),
    ],
)
def test_what_cannot_be_made_is_told_before_the_export(tmp_path, how, precision, message):
    (tmp_path / "x_sam").mkdir()
    with pytest.raises(InputError, match=message):
        check_sam_files(how, load_recipe(precision), tmp_path / "x")


@pytest.mark.parametrize(
    "runtime", [pytest.param("onnxruntime-web", marks=pytest.mark.deployment), "onnxruntime-node"]
)
def test_cornerstone_gets_the_mask_of_predict(published, tmp_path, runtime):
    """A real picture, through the calls of @cornerstonejs/ai on ONNX Runtime's own packages."""
    package = ROOT / ".tools" / "node" / "node_modules" / runtime
    if shutil.which("node") is None or not package.is_dir():
        pytest.skip(f"no Node.js with {runtime}: python3 .ci/tools, or npm install it there")
    picture = read_images(bundled_examples() / "MR_cardiac_LV_SC-HYP-38.npz")[4]
    canvas, _, _ = canvas_of(np.repeat(picture[..., None], 3, 2))
    files = tmp_path / "canvas", tmp_path / "mask"
    files[0].write_bytes(np.dstack([canvas, np.full((1024, 1024), 255, np.uint8)]).tobytes())
    points = [*np.ravel(OUTSIDE).tolist(), *BOX]
    prompts = json.dumps({"points": points, "labels": [0, 0, 0, 2, 3]})
    command = ["node", FEED, package, published, *files, prompts]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)[:2] == [
        ["image_embeddings", "float32", [1, 256, 64, 64]],
        ["masks", "float32", [1, 1, 1024, 1024]],
    ]
    artefact = load_artefact(published.with_name("sam"))
    predictor = Predictor(OnnxRuntimeSession(artefact), artefact.preprocessing)
    predictor.set_image(canvas)
    wanted = predictor.predict_prompts(
        boxes=np.array([BOX]),
        point_coords=np.array([OUTSIDE]),
        point_labels=np.zeros((1, 3), np.int32),
    ).masks[0, 0]
    seen = np.frombuffer(files[1].read_bytes(), np.uint8).reshape(1024, 1024) > 0
    assert 0.01 < wanted.mean() < 0.99
    assert (seen != (wanted != 0)).mean() < 0.001
