"""What the Triton models compute, without a server: equal to local prediction, or a clear error."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from dbsam_deploy.core import imaging, prompts, steps
from dbsam_deploy.core.contract import MAX_IMAGE_PIXELS, MAX_MASK_PIXELS, MAX_POINTS, MAX_PROMPTS
from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.core.prompts import (
    check_mask_input,
    check_mask_pixels,
    check_tokens,
    join_prompts,
)
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession

HOW = Preprocessing(128)
FINE = Preprocessing(64, "lite_medsam", embedding_stride=4)
SIZE = (60, 90)


@pytest.fixture
def image(rng):
    return rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)


BOXES = np.array([[1, 2, 50.5, 40.25], [0, 0, 90, 60]], np.float32)
POINTS = np.array([[[30, 20], [80, 50.5]], [[5, 5], [0, 0]]], np.float32)
LABELS = np.array([[1, 0], [1, -1]], np.int32)


@pytest.mark.parametrize("how", [HOW, FINE], ids=lambda how: how.mode)
def test_box_steps_around_the_graphs_equal_the_predictor(make_artefact, tmp_path, image, how):
    artefact = make_artefact(tmp_path, how.image_size, how.mode, stride=how.embedding_stride)
    session = OnnxRuntimeSession(artefact)
    predictor = Predictor(session, how)
    predictor.set_image(image)
    expected = predictor.predict_boxes(BOXES)
    given = steps.preprocess_boxes({"raw_image": image, "boxes": BOXES}, how)
    embeddings = session.run("encoder", {"image": given["image"]})["image_embeddings"]
    feed = {"image_embeddings": embeddings, "boxes": given["model_boxes"]}
    decoded = session.run("decoder", feed)
    answer = steps.postprocess_boxes({**decoded, "original_size": given["original_size"]}, how)
    assert 0 < expected.masks.mean() < 1
    np.testing.assert_array_equal(answer["masks"], expected.masks[:, 0])
    np.testing.assert_array_equal(answer["iou_scores"], expected.ious[:, 0])
    assert answer["masks"].dtype == np.uint8
    assert answer["masks"].shape == (2, *SIZE)


@pytest.mark.parametrize(
    "given",
    [
        {"boxes": BOXES},
        {"point_coords": POINTS, "point_labels": LABELS},
        {"boxes": BOXES, "point_coords": POINTS, "point_labels": LABELS},
    ],
    ids=["boxes", "points", "both"],
)
@pytest.mark.parametrize("how", [HOW, FINE], ids=lambda how: how.mode)
def test_prompt_steps_give_the_graph_what_the_predictor_gives_it(image, rng, given, how):
    seen = []

    class Recorder:
        backend = "recorder"

        def run(self, graph, feed):
            seen.append(feed)
            count = 2 if graph == "prompt_decoder" else 1
            return {
                "image_embeddings": np.zeros((1, 256, how.grid, how.grid), np.float32),
                "low_res_masks": np.zeros((1, count, 4, how.mask_side, how.mask_side), np.float32),
                "iou_predictions": np.zeros((1, count, 4), np.float32),
            }

    mask_input = rng.standard_normal((2, how.mask_side, how.mask_side)).astype(np.float32)
    predictor = Predictor(Recorder(), how)
    predictor.set_image(image)
    predictor.predict_prompts(**given, mask_input=mask_input)
    coords, labels = join_prompts(SIZE, **given)
    made = steps.preprocess_prompts(
        {
            "raw_image": image,
            "point_coords": coords,
            "point_labels": labels,
            "mask_input": mask_input,
            "has_mask_input": np.ones(2, np.float32),
        },
        how,
    )
    np.testing.assert_array_equal(made["image"], seen[0]["image"])
    for name in ("point_coords", "point_labels", "mask_input", "has_mask_input"):
        np.testing.assert_array_equal(made[f"model_{name}"], seen[1][name])
        assert made[f"model_{name}"].dtype == seen[1][name].dtype


def test_joined_prompts_pass_their_own_check_unchanged():
    for given in (
        {"boxes": BOXES},
        {"point_coords": POINTS, "point_labels": LABELS},
        {"boxes": BOXES, "point_coords": POINTS, "point_labels": LABELS},
    ):
        coords, labels = join_prompts(SIZE, **given)
        again, again_labels = check_tokens(coords, labels, SIZE)
        np.testing.assert_array_equal(again, coords)
        np.testing.assert_array_equal(again_labels, labels)


@pytest.mark.parametrize(
    ("coords", "labels", "message"),
    [
        (np.zeros((1, 2, 3)), [[1, -1]], "expected \\(N, T, 2\\)"),
        (np.zeros((1, 2, 2)), [[1]], "one label a point"),
        (np.zeros((1, 1, 2)), [[1]], "expected at least 1 set of 2"),
        (np.zeros((0, 2, 2)), np.zeros((0, 2)), "0 prompt sets"),
        (np.zeros((1, MAX_POINTS + 1, 2)), np.full((1, MAX_POINTS + 1), -1), "65 points"),
        (np.zeros((1, 2, 2)), [[1, 1]], "must all end with 2, 3"),
        (np.zeros((1, 2, 2)), [[3, 2]], "must all end with 2, 3"),
        (np.zeros((1, 3, 2)), [[2, 3, -1]], "labels"),
        (np.array([[[5.0, 5], [1, 9]]]), [[2, 3]], "x0 < x1"),
        (np.array([[[5.0, 5], [91, 9]]]), [[2, 3]], "reaches outside"),
        (np.array([[[-1.0, 5], [0, 0]]]), [[1, -1]], "outside the image"),
        (np.array([[[np.nan, 5], [0, 0]]]), [[0, -1]], "outside the image"),
        (np.zeros((MAX_PROMPTS + 1, 2, 2)), np.full((MAX_PROMPTS + 1, 2), -1), "257 point"),
    ],
)
def test_unusable_tokens_are_named(coords, labels, message):
    with pytest.raises(InputError, match=message):
        check_tokens(np.asarray(coords, np.float32), np.asarray(labels, np.int32), SIZE)


def test_mixed_prompt_sets_are_refused_rather_than_reinterpreted():
    coords = np.array([[[1, 1], [5, 5]], [[1, 1], [0, 0]]], np.float32)
    with pytest.raises(InputError, match="must all end"):
        check_tokens(coords, np.array([[2, 3], [1, -1]], np.int32), SIZE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no prompt"),
        ({"point_coords": POINTS}, "one is missing"),
        ({"boxes": BOXES[:1], "point_coords": POINTS, "point_labels": LABELS}, "but 1 boxes"),
    ],
)
def test_prompts_that_do_not_go_together(given, message):
    with pytest.raises(InputError, match=message):
        join_prompts(SIZE, **given)


def test_mask_input_is_checked():
    good = np.zeros((2, 32, 32), np.float64)
    assert check_mask_input(good, 2, 32).dtype == np.float32
    for bad in (good[:1], good[:, :31], good.astype(int), np.full_like(good, np.inf)):
        with pytest.raises(InputError, match="mask_input"):
            check_mask_input(bad, 2, 32)


def test_the_answer_may_not_exceed_the_limit():
    side = 2**14
    check_mask_pixels(MAX_MASK_PIXELS // side**2, (side, side))
    with pytest.raises(InputError, match="fewer prompts"):
        check_mask_pixels(MAX_MASK_PIXELS // side**2 + 1, (side, side))


def test_a_request_for_too_many_large_masks_ends_before_any_work(monkeypatch):
    monkeypatch.setattr(prompts, "MAX_MASK_PIXELS", 2 * SIZE[0] * SIZE[1] - 1)
    monkeypatch.setattr(steps, "preprocess", lambda *_: pytest.fail("work was done"))
    image = np.zeros((*SIZE, 3), np.uint8)
    image[0, 0] = 1
    arrays = {"raw_image": image, "boxes": BOXES}
    with pytest.raises(InputError, match="2 masks of 60×90"):
        steps.preprocess_boxes(arrays, HOW)


@pytest.mark.parametrize("size", [(0, 5), (-1, 5), (2**40, 2**40), (1, MAX_IMAGE_PIXELS + 1)])
def test_an_impossible_size_is_refused_by_postprocessing(size):
    arrays = {
        "low_res_masks": np.zeros((1, 1, 1, 32, 32), np.float32),
        "iou_predictions": np.zeros((1, 1, 1), np.float32),
        "original_size": np.array(size, np.int64),
    }
    with pytest.raises(InputError, match="original_size"):
        steps.postprocess_boxes(arrays, HOW)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_overflowed_are_the_engines_fault(value):
    logits = np.zeros((1, 1, 1, 32, 32), np.float32)
    logits[..., 3, 4] = value
    arrays = {
        "low_res_masks": logits,
        "iou_predictions": np.zeros((1, 1, 1), np.float32),
        "original_size": np.array(SIZE, np.int64),
    }
    with pytest.raises(EngineError, match="NaN or infinity"):
        steps.postprocess_boxes(arrays, HOW)


def test_settings_come_from_the_configuration():
    how = Preprocessing(256, "lite_medsam", embedding_stride=4)
    values = {name: {"string_value": str(value)} for name, value in asdict(how).items()}
    config = json.dumps({"parameters": values})
    assert steps.preprocessing_from_config(config) == how
    with pytest.raises(InputError, match="export again"):
        steps.preprocessing_from_config("{}")


class FakeTriton:
    """The few names of Triton's Python module that a step uses."""

    class TritonModelException(Exception):  # noqa: N818 - Triton's name
        pass

    class TritonError:
        INVALID_ARG, INTERNAL = "invalid", "internal"

        def __init__(self, message, code):
            self.message, self.code = message, code

    @staticmethod
    def InferenceResponse(tensors=(), error=None):  # noqa: N802 - Triton's name
        return SimpleNamespace(tensors=tensors, error=error)

    @staticmethod
    def Tensor(name, array):  # noqa: N802 - Triton's name
        return SimpleNamespace(name=name, array=array)


def make_model(step):
    class Model(steps.TritonStep):
        triton = FakeTriton

    Model.step = staticmethod(step)
    model = Model()
    parameters = {name: {"string_value": str(v)} for name, v in asdict(Preprocessing(128)).items()}
    config = json.dumps({"parameters": parameters})
    model.initialize({"model_name": "m", "model_config": config})
    return model


def request(**arrays):
    tensors = [
        SimpleNamespace(name=lambda n=name: n, as_numpy=lambda a=array: a)
        for name, array in arrays.items()
    ]
    return SimpleNamespace(inputs=lambda: tensors)


def test_one_bad_request_does_not_spoil_the_others_of_its_batch(image):
    model = make_model(steps.preprocess_boxes)
    good = request(raw_image=image, boxes=BOXES)
    bad = request(raw_image=image, boxes=BOXES * 9)
    first, second, third = model.execute([good, bad, good])
    assert first.error is None
    assert third.error is None
    assert second.error.code == "invalid"
    assert "reaches outside" in second.error.message
    assert [tensor.name for tensor in first.tensors] == ["image", "model_boxes", "original_size"]
    np.testing.assert_array_equal(first.tensors[0].array, imaging.preprocess(image, HOW))


def test_an_engine_error_is_internal():
    def fail(arrays, how):
        raise EngineError("overflow")

    (answer,) = make_model(fail).execute([request()])
    assert (answer.error.code, answer.error.message) == ("internal", "overflow")


def test_a_missing_library_shows_when_the_model_loads(monkeypatch):
    def missing(*_):
        raise EngineError("needs scikit-image")

    monkeypatch.setattr(steps, "preprocess", missing)
    with pytest.raises(FakeTriton.TritonModelException, match="m: needs scikit-image"):
        make_model(steps.preprocess_boxes)
