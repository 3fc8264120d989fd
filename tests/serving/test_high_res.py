"""A model with finer features beside its embedding, as SAM 2 has them, on the real server too.

The export is of small graphs (`make_tiny_artefact`); SAM 2 itself is in tests/model/test_sam2.py.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.core.contract import HIGH_RES_FEATS
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.graphs.sam_graphs import check_sam_signature
from dbsam_deploy.prediction.predictor import Predictor, ServedPredictor
from dbsam_deploy.serving.repository import build_repository, load_repository
from dbsam_deploy.serving.server import Ports, TritonServer
from dbsam_deploy.serving.triton_config import render_configs
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.sessions.openvino_session import OpenvinoSession
from dbsam_deploy.volumes.embeddings import EmbeddingStore, SharedPredictor, image_key

IMAGE = np.random.default_rng(3).integers(0, 256, (40, 33, 3), dtype=np.uint8)
BOXES = np.array([[2, 3, 30, 25], [10, 12, 20, 39]], np.float32)
POINTS = {
    "point_coords": np.array([[[5, 6], [20, 30]], [[8, 8], [31, 2]]], np.float32),
    "point_labels": np.array([[1, 0], [1, 1]], np.int32),
}


@pytest.fixture(scope="module")
def export(make_artefact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("high_res") / "export"
    return make_artefact(folder, 128, mode="sam2", high_res=True)


def predictor_of(artefact, session=OnnxRuntimeSession) -> Predictor:
    predictor = Predictor(session(artefact), artefact.preprocessing)
    predictor.set_image(IMAGE)
    return predictor


def answers(predictor):
    """Boxes, boxes with points, points with an earlier mask."""
    boxes = predictor.predict_boxes(BOXES)
    yield boxes
    yield predictor.predict_prompts(boxes=BOXES, **POINTS)
    yield predictor.predict_prompts(mask_input=boxes.known_logits()[:, 0], multimask=True, **POINTS)


def check_same(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.masks, other.masks)
        np.testing.assert_array_equal(one.ious, other.ious)
        np.testing.assert_array_equal(one.logits, other.logits)
        assert 0 < one.masks.mean() < 1


@pytest.mark.triton
def test_served_masks_are_the_local_ones(export, server_environment, tmp_path):
    repository = build_repository(export, tmp_path / "repository")
    assert load_repository(repository.folder) == repository
    assert set(repository.known_answers) == {"dbsam", "dbsam_prompts"}
    local = list(answers(predictor_of(export)))
    with (
        TritonServer(
            repository.folder, server_environment, log=tmp_path / "log", ports=Ports(0, 0, 0)
        ) as server,
        DbsamClient(server.grpc_url) as client,
    ):
        predictor = ServedPredictor(client)
        predictor.set_image(IMAGE)
        check_same(answers(predictor), local)


def test_openvino_takes_the_finer_features(export, tmp_path):
    def session(artefact):
        return OpenvinoSession(artefact, cache=tmp_path / "cache")

    for one, other in zip(
        answers(predictor_of(export, session)), answers(predictor_of(export)), strict=True
    ):
        np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=1e-4)


def test_the_finer_features_count(export):
    """The small decoders look at them, or the tests here would prove nothing."""
    predictor = predictor_of(export)
    before = predictor.predict_boxes(BOXES).known_logits()
    features = predictor.encode(IMAGE).copy()
    features[:, 256 * 8 * 8 :] = 0
    predictor.set_embeddings(features, IMAGE.shape[:2])
    assert np.abs(predictor.predict_boxes(BOXES).known_logits() - before).max() > 0.1


def test_all_features_are_kept_for_a_volumes_slices(export):
    predictor = predictor_of(export)
    expected = predictor.predict_boxes(BOXES)
    shared = SharedPredictor(predictor, store=EmbeddingStore(0, 2**24, exact=True))
    pixels = [IMAGE, 255 - IMAGE]
    for image in pixels * 2:
        key = image_key(image)
        found = shared.ask(key, lambda image=image: image, lambda one: one.predict_boxes(BOXES))
        same = np.array_equal(found.known_logits(), expected.known_logits())
        assert same == (image is pixels[0])
    assert shared.store.used == (0, 2 * predictor.encode(IMAGE).nbytes)
    shared.close()


def test_the_embedding_itself_is_what_it_is_for_other_models(export):
    predictor = predictor_of(export)
    assert predictor.image_embeddings.shape == (1, 256, 8, 8)
    assert predictor.encode(IMAGE).shape == (1, 256 * 8 * 8 + 32 * 32 * 32 + 64 * 16 * 16)


def test_a_manifest_and_a_configuration_say_so_and_no_others_do(export, tiny_artefact):
    platforms = dict.fromkeys(("encoder", "decoder", "prompt_decoder"), "onnxruntime")
    for artefact in (export, tiny_artefact):
        body = json.loads((artefact.folder / "manifest.json").read_text())
        configs = render_configs(artefact.preprocessing, platforms)
        told = [*body["preprocessing"], *(n for n in HIGH_RES_FEATS if n in str(configs))]
        assert ("high_res" in configs["dbsam_interactive"]) is (artefact is export)
        more = ["high_res", *HIGH_RES_FEATS] if artefact is export else []
        assert sorted(told) == sorted(["image_size", "embedding_stride", "mode", *more])
    plain = render_configs(Preprocessing(128), platforms)
    finer = render_configs(export.preprocessing, platforms)
    for name in ("dbsam", "dbsam_prompts"):
        assert finer[name] == plain[name]


def test_files_for_viewers_are_refused(export):
    with pytest.raises(InputError, match="SAM 2's decoder takes three outputs"):
        check_sam_signature(export.preprocessing)
