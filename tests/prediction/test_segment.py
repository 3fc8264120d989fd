"""Prompts on volumes: which slices are segmented, labels, overlaps, and what is refused."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbsam_deploy.core.contract import MAX_PROMPTS
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.images.intensity import STORED
from dbsam_deploy.images.volumes import Volume
from dbsam_deploy.prediction import segment as module
from dbsam_deploy.prediction.prompts import Prompts, check_prompts
from dbsam_deploy.prediction.results import Result
from dbsam_deploy.prediction.segment import segment


class BoxPredictor:
    """Answers with the box itself as mask; the IoU is the slice's first grey value / 100."""

    def __init__(self) -> None:
        self.images: list[np.ndarray] = []
        self.calls: list[int] = []
        self.prompted: list[dict[str, Any]] = []

    def set_image(self, image: np.ndarray) -> None:
        self.images.append(image)

    def predict_boxes(self, boxes: np.ndarray) -> Prediction:
        self.calls.append(len(boxes))
        masks = np.stack([self.mask(box) for box in boxes])[:, None]
        iou = np.full((len(boxes), 1), self.images[-1].flat[0] / 100, np.float32)
        return Prediction(masks, iou, np.zeros((len(boxes), 1, 4, 4), np.float32))

    def predict_prompts(self, **prompts: Any) -> Prediction:
        self.prompted.append(prompts)
        boxes = prompts.get("boxes")
        if boxes is None:
            boxes = np.array([[0, 0, 3, 3]])
        one = np.stack([self.mask(box) for box in boxes])
        if not prompts["multimask"]:
            return Prediction(one[:, None], np.full((len(one), 1), 0.5, np.float32), one[:, None])
        masks = np.stack([one, one * 0, 1 - one], axis=1)
        ious = np.tile(np.array([0.3, 0.2, 0.9], np.float32), (len(one), 1))
        return Prediction(masks, ious, masks)

    def mask(self, box: np.ndarray) -> np.ndarray:
        x0, y0, x1, y1 = (int(v) for v in box)
        out = np.zeros(self.images[-1].shape[:2], np.uint8)
        out[y0:y1, x0:x1] = 1
        return out


def volume(depth: int, height: int = 12, width: int = 15) -> Volume:
    """Slices of 10, 11, …, with one brighter pixel."""
    pixels = np.arange(10, 10 + depth, dtype=np.uint8)[:, None, None]
    pixels = np.broadcast_to(pixels, (depth, height, width)).copy()
    pixels[:, -1, -1] = 200
    return Volume(Path("scan"), "npz", pixels, STORED)


def clicks(*points: tuple[float, float, float]) -> dict[str, np.ndarray]:
    """One prompt set of (x, y, label)."""
    array = np.array(points)[None]
    return {"point_coords": array[..., :2], "point_labels": array[..., 2]}


def run(volume: Volume, prompts: Prompts) -> tuple[Result, BoxPredictor]:
    predictor = BoxPredictor()
    return segment(predictor, volume, prompts), predictor


def test_boxes_of_an_image() -> None:
    boxes = np.array([[1, 2, 6, 8], [4, 4, 15, 12]])
    result, predictor = run(volume(1), Prompts(boxes))
    expected = np.zeros((1, 12, 15), np.uint8)
    expected[0, 2:8, 1:6] = 1
    expected[0, 4:12, 4:15] = 2  # the later prompt covers the earlier
    np.testing.assert_array_equal(result.labels, expected)
    assert result.labels.dtype == np.uint8
    assert result.pixels.tolist() == [[30], [88]]
    assert [row.label for row in result.rows()] == [1, 2]
    assert result.rows()[0].prompt == "box 1 2 6 8"
    assert result.slices == (0,)
    assert len(predictor.images) == 1


def test_a_slice_of_a_volume() -> None:
    result, predictor = run(volume(5), Prompts(np.array([[1, 2, 6, 8]]), slice_index=3))
    assert predictor.images[0].shape == (12, 15, 3)
    assert (predictor.images[0][:-1] == 13).all()
    assert result.labels[3].sum() == 30
    assert np.delete(result.labels, 3, axis=0).sum() == 0
    assert result.ious[0, 0] == pytest.approx(0.13)


def test_3d_boxes_cover_z0_to_z1_minus_1() -> None:
    boxes = np.array([[1, 2, 1, 6, 8, 4], [4, 4, 3, 15, 12, 6]])
    progress: list[tuple[int, int]] = []
    predictor = BoxPredictor()
    result = segment(
        predictor,
        volume(8),
        Prompts(boxes_3d=boxes),
        lambda done, total: progress.append((done, total)),
    )
    expected = np.zeros((8, 12, 15), np.uint8)
    expected[1:4, 2:8, 1:6] = 1
    expected[3:6, 4:12, 4:15] = 2
    np.testing.assert_array_equal(result.labels, expected)
    assert result.slices == (1, 2, 3, 4, 5)
    assert [image.flat[0] for image in predictor.images] == [11, 12, 13, 14, 15]
    assert predictor.calls == [1, 1, 2, 1, 1]  # one encoding a slice, its boxes together
    assert result.pixels.tolist() == [[90], [264]]
    assert result.ious[:, 0].tolist() == pytest.approx([0.12, 0.14])
    assert progress == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_a_blank_slice_of_a_3d_box_has_an_empty_mask_and_is_named() -> None:
    boxes = np.array([[1, 2, 1, 6, 8, 4]])
    scan = volume(5)
    scan.pixels[2] = 7
    result, predictor = run(scan, Prompts(boxes_3d=boxes))
    assert result.labels[1:4].any((1, 2)).tolist() == [True, False, True]
    assert (result.slices, result.blank_slices) == ((1, 2, 3), (2,))
    assert len(predictor.images) == 2
    scan.pixels[:] = 7
    with pytest.raises(InputError, match=r"scan: each slice of the 3D boxes.*nothing to segment"):
        run(scan, Prompts(boxes_3d=boxes))


def test_more_boxes_than_one_request_holds() -> None:
    rng = np.random.default_rng()
    corners = rng.integers(0, 10, (MAX_PROMPTS + 44, 2))
    boxes = np.concatenate([corners, corners + 2], axis=1)
    result, predictor = run(volume(1), Prompts(boxes))
    assert predictor.calls == [MAX_PROMPTS, 44]
    assert result.labels.dtype == np.uint16
    expected = np.zeros((12, 15), int)
    for label, (x0, y0, x1, y1) in enumerate(boxes, 1):
        expected[y0:y1, x0:x1] = label
    np.testing.assert_array_equal(result.labels[0], expected)


def test_large_images_are_decoded_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = np.tile([1, 2, 6, 8], (5, 1))
    monkeypatch.setattr(module, "_MASK_BYTES_AT_ONCE", 2 * 12 * 15)
    result, predictor = run(volume(1), Prompts(boxes))
    assert predictor.calls == [2, 2, 1]
    assert [row.label for row in result.rows()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("keep", [False, True])
def test_masks_are_let_go_of_batch_by_batch(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    made: list[weakref.ref[np.ndarray]] = []

    class Watched(BoxPredictor):
        def predict_boxes(self, boxes: np.ndarray) -> Prediction:
            assert keep or not any(known() is not None for known in made)
            found = super().predict_boxes(boxes)
            owner = found.masks if found.masks.base is None else found.masks.base
            made.append(weakref.ref(owner))
            return found

    boxes = np.array([[x, 2, x + 3, 8] for x in range(5)])
    monkeypatch.setattr(module, "_MASK_BYTES_AT_ONCE", 2 * 12 * 15)
    result = segment(Watched(), volume(1), Prompts(boxes), keep_masks=keep)
    assert [known() is not None for known in made] == [False] * 3
    assert (result.own_masks is not None) == (result.logits is not None) == keep
    for index, (x0, y0, x1, y1) in enumerate(boxes if keep else ()):
        inside = result.masks[index, 0]
        assert inside[y0:y1, x0:x1].all()
        assert inside.sum() == (y1 - y0) * (x1 - x0)


def test_masks_of_one_batch_are_not_copied() -> None:
    class Known(BoxPredictor):
        def predict_boxes(self, boxes: np.ndarray) -> Prediction:
            self.found = super().predict_boxes(boxes)
            return self.found

    predictor = Known()
    result = segment(predictor, volume(1), Prompts(np.array([[1, 2, 6, 8]])), keep_masks=True)
    assert result.own_masks is predictor.found.masks
    assert result.logits is predictor.found.logits


def test_points_make_one_prompt_set_with_the_box() -> None:
    points = clicks((3.0, 4.0, 1), (9.0, 2.0, 0))
    result, predictor = run(volume(1), Prompts(np.array([[1, 2, 6, 8]]), **points))
    (prompted,) = predictor.prompted
    np.testing.assert_array_equal(prompted["point_coords"], [[[3, 4], [9, 2]]])
    np.testing.assert_array_equal(prompted["point_labels"], [[1, 0]])
    np.testing.assert_array_equal(prompted["boxes"], [[1, 2, 6, 8]])
    assert result.rows()[0].prompt == "box 1 2 6 8 points +(3, 4) -(9, 2)"
    assert result.labels.sum() == 30
    alone, predictor = run(volume(1), Prompts(**points))
    assert predictor.prompted[0]["boxes"] is None
    assert alone.rows()[0].prompt == "points +(3, 4) -(9, 2)"


def test_multimask_keeps_the_best_and_returns_all() -> None:
    result, _ = run(volume(4), Prompts(np.array([[1, 2, 6, 8]]), slice_index=1, multimask=True))
    assert result.pixels.tolist() == [[30, 0, 150]]
    assert result.ious[0].tolist() == pytest.approx([0.3, 0.2, 0.9])
    assert [row.kept for row in result.rows()] == [False, False, True]
    assert result.alternatives is not None
    assert result.alternatives.shape == (3, 12, 15)
    assert result.alternatives.sum(axis=(1, 2)).tolist() == [30, 0, 150]
    np.testing.assert_array_equal(result.labels[1], result.alternatives[2])
    assert result.labels.sum() == 150


BOX = np.array([[1, 2, 6, 8]])
BOX_3D = np.array([[1, 2, 0, 6, 8, 3]])


@pytest.mark.parametrize(
    ("depth", "prompts", "message"),
    [
        (1, Prompts(), "no prompt"),
        (5, Prompts(BOX), "--slice"),
        (5, Prompts(**clicks((1, 1, 1))), "--slice"),
        (5, Prompts(BOX, slice_index=5), "slices 0–4"),
        (5, Prompts(BOX, slice_index=-1), "slices 0–4"),
        (1, Prompts(BOX, slice_index=1), "slices 0–0"),
        (1, Prompts(boxes_3d=BOX_3D), "2D image"),
        (5, Prompts(BOX, boxes_3d=BOX_3D), "stands alone"),
        (5, Prompts(boxes_3d=BOX_3D, **clicks((1, 1, 1))), "stands alone"),
        (5, Prompts(boxes_3d=BOX_3D, slice_index=1), "not with 3D boxes"),
        (5, Prompts(boxes_3d=BOX_3D, multimask=True), "not with 3D boxes"),
        (5, Prompts(boxes_3d=np.array([[1, 2, 0, 6, 8, 6]])), "z1 <= 5"),
        (5, Prompts(boxes_3d=np.array([[1, 2, -1, 6, 8, 3]])), "0 <= z0"),
        (5, Prompts(boxes_3d=np.array([[1, 2, 3, 6, 8, 3]])), "z0 < z1"),
        (5, Prompts(boxes_3d=np.array([[1, 2, 0.5, 6, 8, 3]])), "whole numbers"),
        (5, Prompts(boxes_3d=np.array([[1, 2, np.nan, 6, 8, 3]])), "whole numbers"),
        (5, Prompts(boxes_3d=np.array([[1, 2, 0, 6, 8, np.inf]])), "whole numbers"),
        (5, Prompts(boxes_3d=np.array([[1, 2, 0, 16, 8, 3]])), "outside the image"),
        (5, Prompts(boxes_3d=np.zeros((0, 6))), "at least one"),
        (1, Prompts(np.zeros((0, 4))), "0 boxes"),
        (1, Prompts(np.array([[6, 2, 1, 8]])), "x0 < x1"),
        (1, Prompts(np.tile(BOX, (2, 1)), **clicks((1, 1, 1))), "one box each"),
        (1, Prompts(**clicks((1, 1, 2))), "point labels"),
        (1, Prompts(mask_input=np.zeros((1, 4, 4))), "alone is no prompt"),
        (1, Prompts(point_coords=np.zeros((1, 1, 2))), "one is missing"),
        (5, Prompts(boxes_3d=BOX_3D, mask_input=np.zeros((1, 4, 4))), "not with 3D boxes"),
        (1, Prompts(**clicks((1, 1, 0.5))), "point labels"),
        (1, Prompts(**clicks((16, 1, 1))), "outside the image"),
    ],
)
def test_prompts_that_do_not_fit(depth: int, prompts: Prompts, message: str) -> None:
    predictor = BoxPredictor()
    with pytest.raises(InputError, match=message):
        segment(predictor, volume(depth), prompts)
    assert predictor.images == []


def test_a_box_beyond_the_first_request_is_checked_before_any_work() -> None:
    boxes = np.concatenate([np.tile(BOX, (MAX_PROMPTS, 1)), [[1, 2, 99, 8]]])
    with pytest.raises(InputError, match="outside the image"):
        check_prompts(Prompts(boxes), volume(1))
