"""The command that makes SAM's two files of an export, and what a browser's viewer gets of them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.tiny_artefact import make_tiny_artefact

from dbsam_deploy import sam_signature
from dbsam_deploy.artefact import find_exports, load_artefact, write_artefact
from dbsam_deploy.cli import run
from dbsam_deploy.graphs import sam_graphs
from dbsam_deploy.images.npz_files import read_images
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.verification.cases import bundled_examples
from dbsam_deploy.verification.sam_parity import canvas_of

ROOT = Path(__file__).resolve().parents[1]
FEED = ROOT / "tests" / "support" / "cornerstone_feed.cjs"
BOX = [200.0, 300.0, 700.0, 800.0]
OUTSIDE = [[512.0, 512.0], [100.0, 800.0], [900.0, 200.0]]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Files of a small model of SAM's geometry, beside their export."""
    export = tmp_path_factory.mktemp("build") / "sam"
    make_tiny_artefact(export, image_size=1024)
    assert run(sam_signature.main, [str(export)]) == 0
    return export.with_name("sam_sam")


def test_the_files_are_published_with_what_they_came_from(published):
    record = json.loads((published / "sam.json").read_text())
    artefact = load_artefact(published.with_name("sam"))
    assert sorted(path.name for path in published.iterdir()) == [
        "decoder.onnx",
        "encoder.onnx",
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


def test_files_that_differ_are_not_published(tmp_path, monkeypatch, capsys):
    export = tmp_path / "lite"
    make_tiny_artefact(export, image_size=256, mode="lite_medsam", stride=4)
    assert run(sam_signature.main, [str(export)]) == 0
    before = (export.with_name("lite_sam") / "sam.json").read_bytes()
    monkeypatch.setattr(sam_graphs, "_PROMPTS", sam_graphs._PROMPTS.replace("{scale}", "0.2"))
    assert run(sam_signature.main, [str(export)]) == 1
    assert "Nothing was published" in capsys.readouterr().err
    assert (export.with_name("lite_sam") / "sam.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lite", "lite_sam"]


def test_mistakes_are_one_line(tmp_path, capsys):
    export = tmp_path / "tiny"
    artefact = make_tiny_artefact(export, image_size=512)
    (tmp_path / "other").mkdir()
    for words, message in (
        ([str(export)], "image size 512"),
        ([str(export), "--output", str(tmp_path / "other")], "was not made by this command"),
        ([str(tmp_path / "none")], "no manifest.json"),
    ):
        assert run(sam_signature.main, words) == 2
        assert message in capsys.readouterr().err
    artefact.quantization["graphs"] = ["encoder"]
    write_artefact(artefact)
    assert run(sam_signature.main, [str(export)]) == 2
    assert "quantised" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "tiny"]


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
