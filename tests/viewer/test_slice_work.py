"""Clicks on a slice, of weights that know points and of those that know boxes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.box_trained import blocks, picture
from support.bright import BrightPredictor

from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.core.points import BOX_TRAINED, NATIVE, PointRules
from dbsam_deploy.core.prompt_adapter import AT_ONCE
from dbsam_deploy.images.arrays import as_volume
from dbsam_deploy.viewer.slice_work import SliceWork, Wish
from dbsam_deploy.volumes.embeddings import SharedPredictor
from dbsam_deploy.volumes.slices import VolumeSlices

OBJECT = blocks((20, 16, 40, 30))


class Counting(BrightPredictor):
    """Counts boxes and prompt sets; `points` as a model has it."""

    def __init__(self, points: PointRules | None) -> None:
        super().__init__()
        self.points, self.boxes, self.sets = points, 0, []

    def predict_boxes(self, boxes: np.ndarray) -> Prediction:
        self.boxes += len(boxes)
        return super().predict_boxes(boxes)

    def predict_prompts(self, *, multimask: bool = False, **prompts: Any) -> Prediction:
        self.sets.append((multimask, prompts))
        return super().predict_prompts(multimask=multimask, **prompts)


def clicked(predictor: Counting, before: np.ndarray, *clicks: tuple[int, int, bool]) -> np.ndarray:
    slices = VolumeSlices(SharedPredictor(predictor), as_volume(picture(OBJECT)))
    work = SliceWork(slices, slices.along(0), 0, before)
    return work.clicks(Wish(clicks=clicks)).mask


@pytest.mark.parametrize(
    ("points", "boxes", "sets"), [(NATIVE, 0, 1), (BOX_TRAINED, 6, 0), (None, 6, 0)]
)
def test_a_first_click_is_answered_as_the_weights_understand_it(points, boxes, sets):
    predictor = Counting(points)
    mask = clicked(predictor, np.zeros_like(OBJECT), (20, 25, True))
    assert mask[20, 25]
    assert (predictor.boxes, len(predictor.sets)) == (boxes, sets)
    if sets:
        np.testing.assert_array_equal(mask, OBJECT)
        ((multimask, asked),) = predictor.sets
        assert (multimask, asked["adapt_points"], "boxes" in asked) == (True, False, False)
        assert asked["point_coords"].tolist() == [[[25.5, 20.5]]]


@pytest.mark.parametrize(("points", "sets"), [(NATIVE, 1), (BOX_TRAINED, 0)])
def test_a_click_past_the_mask_grows_it_as_the_weights_understand_it(points, sets):
    predictor, before = Counting(points), blocks((20, 16, 30, 30))
    mask = clicked(predictor, before, (20, 38, True))
    assert mask[20, 38]
    assert mask[before].all()
    assert len(predictor.sets) == sets
    if sets:
        assert predictor.boxes == 0
        ((multimask, asked),) = predictor.sets
        assert (multimask, asked["boxes"].tolist()) == (False, [[20, 16, 30, 30]])


class Forgetful(Counting):
    """Finds in a box no more than its right half."""

    def predict_boxes(self, boxes: np.ndarray) -> Prediction:
        found = super().predict_boxes(boxes)
        for mask, (x0, _, x1, _) in zip(found.masks[:, 0], boxes, strict=True):
            mask[:, : int(x0 + x1) // 2] = 0
        return found


def test_a_click_inside_takes_nothing_away():
    predictor, before = Forgetful(BOX_TRAINED), blocks((20, 16, 30, 30))
    mask = clicked(predictor, before, (20, 38, True))
    assert mask[20, 38]
    assert mask[20, 34]  # found, and not only the disc of the click
    assert mask[before].all()
    assert not (mask & ~OBJECT).any()


def test_an_earlier_click_is_obeyed_without_asking_the_model_again():
    predictor, before = Counting(BOX_TRAINED), blocks((20, 16, 30, 30))
    mask = clicked(predictor, before, (22, 35, False), (20, 38, True))
    assert predictor.boxes == AT_ONCE
    assert mask[20, 38]
    assert not mask[21:24, 34:37].any()
    assert mask[22, 32]
    np.testing.assert_array_equal(mask & before, before)
