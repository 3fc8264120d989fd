"""The challenge's protocol with models whose masks are known in advance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.references import as_prediction, bright_in_box, labelled_case, labelled_squares

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.evaluation import build_protocol, evaluate
from dbsam_deploy.evaluation.boxes import fill_box
from dbsam_deploy.evaluation.metrics import dice, surface_dice


def nothing(image: np.ndarray, boxes: np.ndarray) -> Prediction:
    return as_prediction(np.zeros((len(boxes), *image.shape[:2]), bool))


PROTOCOL = build_protocol("cvpr24")


def test_own_boxes_and_later_labels_over_earlier_ones() -> None:
    labels = labelled_squares(1, 64, (10, 10, 20), (20, 20, 20))
    boxes = np.array([[5, 5, 40, 40], [20, 20, 39, 39]], np.float32)
    seen: list[np.ndarray] = []

    def watch(image: np.ndarray, prompts: np.ndarray) -> Prediction:
        seen.append(prompts)
        return as_prediction(
            np.stack([fill_box(b, image.shape[:2], inclusive=True) for b in prompts])
        )

    result = evaluate(watch, [labelled_case(labels, boxes=boxes)], PROTOCOL)
    np.testing.assert_array_equal(seen[0], boxes)
    first = np.zeros((64, 64), bool)
    first[5:41, 5:41] = True
    first[20:40, 20:40] = False
    assert result.objects[0].score.dsc == pytest.approx(dice(first, labels[0] == 1))
    assert result.objects[1].score.dsc == 1
    assert result.cases[0].score.dsc == pytest.approx(
        np.mean([item.score.dsc for item in result.objects])
    )
    assert result.cases[0].tolerance == "2 px"


def test_the_surface_of_an_image_is_a_slabs_and_counts_from_a_dice_of_02() -> None:
    labels = labelled_squares(1, 64, (10, 10, 20))

    def shifted(by: int) -> Callable[[np.ndarray, np.ndarray], Prediction]:
        def model(image: np.ndarray, boxes: np.ndarray) -> Prediction:
            return as_prediction(np.roll(labels == 1, by, 2))

        return model

    (item,) = evaluate(shifted(5), [labelled_case(labels)], PROTOCOL).objects
    truth = (labels[0] == 1)[..., None]
    assert item.score.nsd == surface_dice(np.roll(truth, 5, 1), truth, 2.0)
    (item,) = evaluate(shifted(18), [labelled_case(labels)], PROTOCOL).objects
    assert item.score.dsc == pytest.approx(0.1)
    assert item.score.nsd == 0
    assert surface_dice(np.roll(truth, 18, 1), truth, 2.0) > 0


def test_a_volume_is_followed_from_its_middle_slice() -> None:
    labels = np.zeros((7, 256, 256), np.uint8)
    for z in range(1, 6):  # slides by 4 px a slice
        labels[z, 100:120, 60 + 4 * z : 90 + 4 * z] = 1
    boxes = np.array([[70, 98, 1, 104, 122, 6]], np.float32)
    seen: dict[int, list[float]] = {}
    case = labelled_case(labels, spacing_mm=(2.0, 1.0, 1.0), boxes=boxes)

    def watch(image: np.ndarray, prompts: np.ndarray) -> Prediction:
        columns = np.flatnonzero(image[..., 0].any(0))
        seen[int(columns.min() - 60) // 4] = prompts[0].tolist()
        return bright_in_box(image, prompts)

    result = evaluate(watch, [case], PROTOCOL)
    assert list(seen) == [3, 4, 5, 2, 1]
    assert seen[3] == [70, 98, 104, 122]
    # slice 3's mask is columns 72–101 and rows 100–119, 3 px wider
    assert seen[4] == seen[2] == [69, 97, 104, 122]
    (item,) = result.objects
    assert item.slice_index is None
    assert item.box == (70, 98, 1, 104, 122, 6)
    found = np.zeros(labels.shape, bool)
    for z, (x0, _, x1, _) in seen.items():
        found[z] = labels[z] == 1
        found[z, :, : int(x0)] = found[z, :, int(x1) + 1 :] = False
    assert item.score.dsc == pytest.approx(dice(found, labels == 1))
    assert 0.5 < item.score.dsc < 1
    assert item.score.nsd == surface_dice(found, labels == 1, 2.0, (2.0, 1.0, 1.0))
    assert (result.cases[0].dimensions, result.cases[0].tolerance) == ("3D", "2 mm")
    assert result.cases[0].slices == 5


def test_an_empty_mask_falls_back_to_the_first_box() -> None:
    labels = np.zeros((5, 64, 64), np.uint8)
    labels[:, 20:40, 20:40] = 1
    prompts = []

    def blind(image: np.ndarray, boxes: np.ndarray) -> Prediction:
        prompts.append(boxes[0].tolist())
        return nothing(image, boxes)

    case = labelled_case(labels, spacing_mm=(1.0, 1.0, 1.0))
    (item,) = evaluate(blind, [case], PROTOCOL).objects
    x0, y0, _, x1, y1, _ = item.box
    assert prompts == [[x0, y0, x1, y1]] * 5


def test_labels_that_share_slices_go_in_one_call_and_the_later_one_stands() -> None:
    labels = np.zeros((6, 64, 64), np.uint8)
    labels[0:6, 10:30, 10:30] = 1
    labels[2:6, 25:45, 25:45] = 2
    boxes = np.array([[8, 8, 0, 40, 40, 6], [24, 24, 2, 46, 46, 6]], np.float32)
    sizes = []

    def model(image: np.ndarray, prompts: np.ndarray) -> Prediction:
        sizes.append(len(prompts))
        return as_prediction(
            np.stack([fill_box(b, image.shape[:2], inclusive=True) for b in prompts])
        )

    case = labelled_case(labels, spacing_mm=(1.0, 1.0, 1.0), boxes=boxes)
    result = evaluate(model, [case], PROTOCOL, with_nsd=False)
    # middles are 2 and 3: up 2, 3, 4, 5; down 2 for the second label, then 1 and 0
    assert sizes == [1, 2, 2, 2, 1, 1, 1]
    assert result.cases[0].slices == 6
    alone = {}
    for label in (1, 2):
        only = np.where(labels == label, label, 0)
        case = labelled_case(only, spacing_mm=(1.0, 1.0, 1.0), boxes=boxes)
        (alone[label],) = evaluate(model, [case], PROTOCOL, with_nsd=False).objects
    assert result.objects[1].score == alone[2].score
    # what the second label took had been wrong for the first
    assert result.objects[0].score.dsc > alone[1].score.dsc


def test_a_limit_takes_the_middle_of_a_volume() -> None:
    labels = np.zeros((9, 64, 64), np.uint8)
    labels[1:8, 10:30, 10:30] = 1
    labels[1, 40:50, 40:50] = 2
    case = labelled_case(labels, spacing_mm=(1.0, 1.0, 1.0))
    result = evaluate(bright_in_box, [case], PROTOCOL, max_slices=3)
    assert [item.label for item in result.objects] == [1]
    assert result.cases[0].slices == 3
    assert result.objects[0].pixels == 3 * 400
    assert {s.reason: s.count for s in result.skipped} == {
        "slice beyond the limit of 3": 4,
        "label only on slices beyond the limit of 3": 1,
    }


def test_a_stack_without_spacing_is_images() -> None:
    case = labelled_case(labelled_squares(3, 64, (10, 10, 20)))
    result = evaluate(bright_in_box, [case], PROTOCOL)
    assert [c.name for c in result.cases] == [f"task/case.npz[{z}]" for z in range(3)]
    assert {c.dimensions for c in result.cases} == {"2D"}


@pytest.mark.parametrize(
    ("boxes", "spacing", "message"),
    [
        ([[1, 1, 9, 9]], None, r"boxes \(n, 4\) for 2 slices"),
        ([[1, 1, 0, 9, 9, 2]], None, "no spacing"),
        ([[1, 1, 0, 9, 9, 2]], (1, 1, 1), "1 boxes, but gts has label 2"),
        ([[1, 1, 0, 9, 9, 2], [1, 1, 0, 9, 9, 5]], (1, 1, 1), "z1 <= 2"),
        ([[1, 1, 0, 9, 9, 2], [1, 1, 0, 90, 9, 2]], (1, 1, 1), "outside the image"),
    ],
)
def test_unusable_boxes_name_the_file(boxes: list[list[float]], spacing: Any, message: str) -> None:
    labels = labelled_squares(2, 64, (10, 10, 20), (40, 40, 10))
    case = labelled_case(labels, boxes=np.array(boxes, np.float32), spacing_mm=spacing)
    with pytest.raises(InputError, match=message) as caught:
        evaluate(bright_in_box, [case], PROTOCOL)
    assert "task/case.npz" in str(caught.value)
