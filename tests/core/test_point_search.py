"""Which boxes are tried for a click, and which answer is taken."""

from __future__ import annotations

import numpy as np
import pytest

from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.core.point_search import (
    best_answer,
    boxes_around,
    boxes_beside,
    boxes_past,
)

SIZE = (60, 100)


def check_inside(boxes: np.ndarray) -> None:
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= (SIZE[1], SIZE[0])).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()


@pytest.mark.parametrize("place", [(50, 30), (0, 0), (99, 59), (3, 57)])
def test_boxes_around_a_pixel_hold_it_at_any_size(place):
    pixel = np.array([*place, place[0] + 1, place[1] + 1], float)
    boxes = boxes_around(pixel, SIZE)
    assert boxes.shape == (6, 4)
    check_inside(boxes)
    assert ((boxes[:, :2] <= pixel[:2]) & (boxes[:, 2:] >= pixel[2:])).all()
    widths = boxes[:, 2] - boxes[:, 0]
    assert widths.max() > 6 * widths.min()


def test_boxes_past_a_box_hold_it_and_leave_old_sides_where_they_are():
    earlier, both = np.array([20.0, 10, 40, 30]), np.array([20.0, 10, 55, 30])
    boxes = boxes_past(both, earlier, SIZE)
    check_inside(boxes)
    assert ((boxes[:, :2] <= both[:2]) & (boxes[:, 2:] >= both[2:])).all()
    kept = (boxes[:, [0, 1, 3]] == earlier[[0, 1, 3]]).all(1)
    assert 1 < kept.sum() < len(boxes)
    assert boxes[:, 2].max() == 72.5
    fewer = boxes_past(both, earlier, SIZE, where_new=(0.1, 0.35))
    np.testing.assert_array_equal(fewer, boxes[[0, 1, 3, 4, 5, 7, 8, 9]])


def test_the_surest_answer_of_those_that_obey_is_taken():
    wanted = np.zeros(SIZE, bool)
    wanted[10, 20:30] = True
    masks = np.zeros((4, 1, *SIZE), np.uint8)
    masks[1, 0, 10, 20:30] = masks[2, 0, 5:15, 15:35] = masks[3, 0, 10, 20:22] = 1
    ious = np.array([[0.99], [0.5], [0.7], [0.9]], np.float32)
    assert best_answer(Prediction(masks, ious), wanted) == 2
    assert best_answer(Prediction(masks[:1], ious[:1]), wanted) is None


def test_a_correction_obeys_and_keeps_to_what_there_was():
    before, wanted, unwanted = (np.zeros(SIZE, bool) for _ in range(3))
    before[10:20, 20:60] = wanted[12, 22] = unwanted[15, 55] = True
    masks = np.zeros((4, 1, *SIZE), np.uint8)
    masks[0, 0] = before  # ignores the click
    masks[1, 0, 10:20, 20:50] = 1
    masks[2, 0, 11:13, 21:24] = 1  # a small part, of which the model is a little surer
    masks[3, 0, 30:40, 20:60] = 1  # does not have what is wanted
    ious = np.array([[0.99], [0.8], [0.9], [0.99]], np.float32)
    assert best_answer(Prediction(masks, ious), wanted, unwanted, before) == 1


def test_boxes_beside_a_click_leave_it_out():
    box, pixel = np.array([20.0, 10, 60, 30]), np.array([50.0, 15, 51, 16])
    whole, *cuts = boxes_beside(box, pixel, SIZE)
    assert whole.tolist() == box.tolist()
    assert [cut.tolist() for cut in cuts] == [
        [20, 10, 50, 30],
        [20, 10, 60, 15],
        [51, 10, 60, 30],
        [20, 16, 60, 30],
    ]
