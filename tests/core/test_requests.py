"""Prompts of a request: what the graph gets is what the predictor gives it, or a clear error."""

from __future__ import annotations

import numpy as np
import pytest
from support.prompt_sets import prompt_sets

from dbsam_deploy.core import imaging, prompts
from dbsam_deploy.core.contract import MAX_MASK_PIXELS, MAX_POINTS, MAX_PROMPTS
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.core.prompts import (
    check_mask_input,
    check_mask_pixels,
    check_tokens,
    join_prompts,
)
from dbsam_deploy.core.requests import read_prompts
from dbsam_deploy.prediction.predictor import Predictor

HOW = Preprocessing(128)
FINE = Preprocessing(64, "lite_medsam", embedding_stride=4)
SIZE = (60, 90)


@pytest.fixture
def image(rng):
    return rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)


BOXES = np.array([[1, 2, 50.5, 40.25], [0, 0, 90, 60]], np.float32)
POINTS = np.array([[[30, 20], [80, 50.5]], [[5, 5], [0, 0]]], np.float32)
LABELS = np.array([[1, 0], [1, -1]], np.int32)


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
def test_prompts_reach_the_graph_as_the_predictor_gives_them(image, rng, given, how):
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
    sets = prompt_sets(SIZE, mask_input, **given)
    made = read_prompts(sets, SIZE, how)
    assert (made.graph, made.count, made.masks) == ("prompt_decoder", 2, 4)
    assert list(made.feed) == [name for name in seen[1] if name != "image_embeddings"]
    for name, array in made.feed.items():
        np.testing.assert_array_equal(array[None], seen[1][name])
        assert array.dtype == seen[1][name].dtype


@pytest.mark.parametrize("how", [HOW, FINE], ids=lambda how: how.mode)
def test_boxes_go_to_the_model_frame(how):
    made = read_prompts({"boxes": BOXES}, SIZE, how)
    assert (made.graph, made.count, made.masks) == ("decoder", 2, 1)
    np.testing.assert_array_equal(made.feed["boxes"], imaging.to_model_frame(BOXES, SIZE, how))


def test_no_prompt_is_no_mistake():
    assert read_prompts({"raw_image": np.zeros((*SIZE, 3), np.uint8)}, SIZE, HOW) is None


SETS = {
    "point_coords": np.array([[[5, 5], [0, 0]]], np.float32),
    "point_labels": np.array([[1, -1]], np.int32),
    "mask_input": np.zeros((1, 32, 32), np.float32),
    "has_mask_input": np.zeros(1, np.float32),
}


def test_without_earlier_masks_they_are_zero():
    made = read_prompts({name: SETS[name] for name in ("point_coords", "point_labels")}, SIZE, HOW)
    expected = read_prompts(SETS, SIZE, HOW)
    assert list(made.feed) == list(expected.feed)
    for name, array in made.feed.items():
        np.testing.assert_array_equal(array, expected.feed[name])
        assert (array.dtype, array.shape) == (expected.feed[name].dtype, expected.feed[name].shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": BOXES}, "boxes together with"),
        ({"mask_input": None}, r"without \['mask_input'\]"),
        ({"point_coords": None, "point_labels": None}, "without"),
        ({"has_mask_input": np.zeros(2, np.float32)}, "0 or 1 for 1 prompts"),
        ({"has_mask_input": np.full(1, 0.5, np.float32)}, "0 or 1 for 1 prompts"),
        ({"mask_input": np.zeros((2, 32, 32), np.float32)}, "mask_input"),
        ({"multimask_tokens": np.array([2], np.uint8)}, r"multimask_tokens \[2\]: expected"),
        ({"multimask_tokens": np.zeros(0, np.uint8)}, r"multimask_tokens \[\]: expected"),
        ({"multimask_tokens": np.ones(1, np.uint8), "point_coords": None}, "without"),
    ],
)
def test_prompts_that_are_no_set_are_refused(change, message):
    arrays = {name: array for name, array in {**SETS, **change}.items() if array is not None}
    assert read_prompts(SETS, SIZE, HOW).count == 1
    with pytest.raises(InputError, match=message):
        read_prompts(arrays, SIZE, HOW)


def test_boxes_have_no_alternatives():
    with pytest.raises(InputError, match=r"boxes together with \['multimask_tokens'\]"):
        read_prompts({"boxes": BOXES, "multimask_tokens": np.ones(1, np.uint8)}, SIZE, HOW)


def test_masks_that_nobody_wants_count_for_no_limit():
    side = 8192
    sets = {
        "point_coords": np.tile(SETS["point_coords"], (12, 1, 1)),
        "point_labels": np.tile(SETS["point_labels"], (12, 1)),
        "multimask_tokens": np.zeros(1, np.uint8),
    }
    assert 12 * side**2 <= MAX_MASK_PIXELS < 2 * 12 * side**2
    assert read_prompts(sets, (side, side), HOW).masks == 1
    sets["multimask_tokens"] = np.ones(1, np.uint8)
    with pytest.raises(InputError, match="fewer prompts"):
        read_prompts(sets, (side, side), HOW)


CORNERS = [[[1, 2], [50.5, 40.25]], [[0, 0], [90, 60]]]


@pytest.mark.parametrize(
    ("given", "coords", "labels"),
    [
        ({"boxes": BOXES}, CORNERS, [[2, 3], [2, 3]]),
        (
            {"point_coords": POINTS.astype(np.float64), "point_labels": LABELS.astype(np.int64)},
            [[[30, 20], [80, 50.5], [0, 0]], [[5, 5], [0, 0], [0, 0]]],
            [[1, 0, -1], [1, -1, -1]],
        ),
        (
            {"boxes": BOXES, "point_coords": POINTS[:, :1], "point_labels": LABELS[:, :1]},
            [[[30, 20], *CORNERS[0]], [[5, 5], *CORNERS[1]]],
            [[1, 2, 3], [1, 2, 3]],
        ),
    ],
    ids=["boxes", "points", "both"],
)
def test_points_come_first_and_a_box_or_no_point_ends_them(given, coords, labels):
    joined, marks = join_prompts(SIZE, **given)
    assert (joined.dtype, marks.dtype) == (np.float32, np.int32)
    assert (joined.tolist(), marks.tolist()) == (coords, labels)


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
        (np.zeros((1, 2)), [[1, -1]], r"shape \(1, 2\): expected \(N, T, 2\)"),
        (np.zeros((1, 2, 2)), [[1]], r"shape \(1, 1\): expected \(1, 2\), one label a point"),
        (np.zeros((1, 1, 2)), [[1]], "1 prompt sets of 1 points: expected at least 1 set of 2–64"),
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
        ({"point_labels": LABELS}, "one is missing"),
        (
            {"boxes": BOXES[:1], "point_coords": POINTS, "point_labels": LABELS},
            "2 point prompts but 1 boxes: expected one each",
        ),
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
    check_mask_pixels(1, (2**13, 2**17))
    message = r"^5 masks of 8192×32768 pixels are 1342177280 mask pixels: at most 1073741824 in one"
    with pytest.raises(InputError, match=message):
        check_mask_pixels(5, (2**13, 2**15))


@pytest.mark.parametrize("arrays", [{"boxes": BOXES}, SETS], ids=["boxes", "sets"])
def test_too_many_large_masks_are_refused(monkeypatch, arrays):
    monkeypatch.setattr(prompts, "MAX_MASK_PIXELS", 2 * SIZE[0] * SIZE[1] - 1)
    with pytest.raises(InputError, match="masks of 60×90"):
        read_prompts(arrays, SIZE, HOW)
