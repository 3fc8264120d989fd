"""The protocol of the paper with models whose masks are known in advance."""

from __future__ import annotations

import numpy as np
import pytest
from support.references import (
    as_prediction,
    bright_in_box,
    labelled_case,
    labelled_squares,
    repeat_box,
)

from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.evaluation import build_protocol, evaluate
from dbsam_deploy.evaluation.medsam import resize_image, resize_labels
from dbsam_deploy.evaluation.metrics import surface_dice
from dbsam_deploy.evaluation.tables import beside_cells, tolerance_text

PROTOCOL = build_protocol("medsam")


def test_boxes_grow_by_nine_on_the_256_grid() -> None:
    labels = labelled_squares(2, 256, (30, 40, 50))
    seen: list[np.ndarray] = []

    def watch(image: np.ndarray, boxes: np.ndarray) -> Prediction:
        assert image.shape == (256, 256, 3)
        seen.append(boxes)
        return repeat_box(image, boxes)

    evaluate(watch, [labelled_case(labels)], PROTOCOL, with_nsd=False)
    # inclusive: the last row and column are 79 and 89
    np.testing.assert_array_equal(np.concatenate(seen), [[31, 21, 98, 88]] * 2)


def test_a_stack_has_one_dice_and_images_their_mean() -> None:
    labels = np.zeros((2, 256, 256), np.uint8)
    labels[0, 20:120, 20:120] = 1
    labels[1, 50:70, 50:70] = 1

    def half(image: np.ndarray, boxes: np.ndarray) -> Prediction:
        masks = bright_in_box(image, boxes).masks[:, 0].astype(bool)
        masks[:, :60] = False  # all but 60 of 100 rows, and 10 of 20
        return as_prediction(masks)

    scores = {}
    for task in ("MR_3D", "some_2D_task"):
        case = labelled_case(labels, name=f"{task}/x.npz")
        result = evaluate(half, [case], PROTOCOL)
        (outcome,) = result.cases
        assert outcome.dimensions == ("2D" if task == "some_2D_task" else "3D")
        scores[task] = outcome.score
        assert outcome.tolerance == "1 voxel"
        assert outcome.name == f"{task}/x.npz:first"
    dice_each = [2 * 6000 / 16000, 2 * 200 / 600]
    assert scores["some_2D_task"].dsc == pytest.approx(np.mean(dice_each))
    assert scores["MR_3D"].dsc == pytest.approx(2 * 6200 / (6200 + 10400))
    # as coded, the surface is the stack's in both
    assert scores["MR_3D"].nsd == scores["some_2D_task"].nsd
    assert scores["MR_3D"].hd95 == scores["some_2D_task"].hd95 > 30
    assert scores["MR_3D"].volume_error == pytest.approx(1 - 6200 / 10400)
    text = " ".join(tolerance_text(result).split())
    assert text == "NSD within 1 voxel; HD95 in voxel"
    cells = beside_cells(result, scores["some_2D_task"])
    assert cells == (f"{scores['MR_3D'].hd95:.1f}", "40.38")
    found = labels.copy()
    found[:, :60] = 0
    assert scores["MR_3D"].nsd == surface_dice(found, labels, 1.0)


def test_small_slices_are_dropped_and_counted() -> None:
    labels = labelled_squares(3, 256, (30, 40, 50), (200, 200, 10))
    labels[1, 30:80, 40:90] = 0
    labels[1, 30:40, 40:50] = 1  # 100 px: not more than 100
    result = evaluate(repeat_box, [labelled_case(labels)], PROTOCOL, with_nsd=False)
    assert [(o.label, o.slice_index) for o in result.objects] == [(1, 0), (1, 2)]
    assert {s.reason: s.count for s in result.skipped} == {
        "object of at most 100 px at 256×256": 4,
        "label left without a slice": 1,
    }


def test_the_logits_are_cut_and_not_the_masks() -> None:
    labels = labelled_squares(1, 256, (30, 40, 50))
    truth = labels[0] == 1

    def two_opinions(image: np.ndarray, boxes: np.ndarray) -> Prediction:
        logits = np.where(truth, 0.01, 0.0)[None].astype(np.float32)
        return as_prediction(~truth[None], logits)

    result = evaluate(two_opinions, [labelled_case(labels)], PROTOCOL)
    assert result.cases[0].score.dsc == 1

    def small_grid(image: np.ndarray, boxes: np.ndarray) -> Prediction:
        return as_prediction(truth[None], np.ones((1, 64, 64), np.float32))

    result = evaluate(small_grid, [labelled_case(labels)], PROTOCOL)
    assert result.cases[0].score.dsc == 1


def test_other_sizes_are_squeezed(rng: np.random.Generator) -> None:
    pytest.importorskip("skimage")
    labels = np.zeros((1, 100, 130), np.uint8)
    labels[0, 10:60, 20:70] = 3
    result = evaluate(bright_in_box, [labelled_case(labels)], PROTOCOL, with_nsd=False)
    (item,) = result.objects
    assert item.pixels == int((resize_labels(labels[0]) == 3).sum())
    assert item.pixels == pytest.approx(2500 * 2.56 * 256 / 130, rel=0.02)
    assert item.score.dsc > 0.97
    image = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert resize_image(image) is image
    assert set(np.unique(resize_labels(labels[0]))) == {0, 3}


def test_millimetres_where_the_file_has_them() -> None:
    labels = np.zeros((4, 256, 256), np.uint8)
    labels[1:3, 30:80, 40:90] = 1

    def shifted(image: np.ndarray, boxes: np.ndarray) -> Prediction:
        return as_prediction(np.roll(bright_in_box(image, boxes).masks[:, 0] != 0, 1, 2))

    protocol = build_protocol("medsam", millimetres=True)
    with_spacing = labelled_case(labels, spacing_mm=(5.0, 0.7, 2.0))
    (case,) = evaluate(shifted, [with_spacing], protocol).cases
    assert case.tolerance == "1 mm"
    truth = labels[1:3] == 1
    assert case.score.nsd == surface_dice(np.roll(truth, 1, 2), truth, 1, (5.0, 0.7, 2.0))
    assert case.score.nsd is not None
    assert case.score.nsd < 1
    (case,) = evaluate(shifted, [labelled_case(labels)], protocol).cases
    assert (case.tolerance, case.score.nsd) == ("1 voxel", 1)


def test_the_interval_contains_its_mean() -> None:
    cases = [
        labelled_case(labelled_squares(n, 256, (30, 40, 20 * n)), name=f"t/{n}.npz") for n in (1, 3)
    ]
    (task,) = evaluate(repeat_box, cases, PROTOCOL, with_nsd=False).tasks
    interval = task.mean.dsc_interval
    assert interval is not None
    assert interval.unit == "cases"
    assert interval.low <= task.mean.score.dsc <= interval.high
