"""Boxes and masks for training."""

import numpy as np
import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import check_boxes
from dbsam_deploy.training.prompts import (
    CODED_GROWTH,
    PAPER_GROWTH,
    Growth,
    draw_prompts,
)
from dbsam_deploy.training.samples import Sample
from dbsam_deploy.training.synthetic_images import Synthetic

NO_GROWTH = Growth(px=0)


def rng():
    return np.random.default_rng()


def labelled(labels):
    return Sample("s", np.zeros((*labels.shape, 3), np.uint8), labels.astype(np.int32))


def tight(mask):
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize("growth", [NO_GROWTH, PAPER_GROWTH, CODED_GROWTH])
def test_boxes_hold_their_objects_and_reach_no_further_than_allowed(growth):
    source = Synthetic(int(rng().integers(2**31)))
    for index in range(8):
        sample = source.sample(index)
        prompts = draw_prompts(sample, 6, growth, rng())
        height, width = sample.labels.shape
        check_boxes(prompts.boxes, (height, width))
        assert prompts.boxes.dtype == np.float32
        assert prompts.masks.shape == (len(prompts.boxes), height, width)
        assert prompts.masks.dtype == bool
        scale = max(height, width) / growth.frame
        reach = growth.px * scale
        for box, mask in zip(prompts.boxes, prompts.masks, strict=True):
            grown = (box - tight(mask)) * (-1, -1, 1, 1)
            assert (grown >= -1e-3).all()
            assert (grown <= reach + 1e-3).all()
            label = sample.labels[mask][0]
            np.testing.assert_array_equal(mask, sample.labels == label)


def test_growth_as_coded_moves_by_whole_pixels_of_the_256_grid():
    labels = np.zeros((512, 512))
    labels[200:300, 180:320] = 1
    moves = {
        float(move)
        for _ in range(40)
        for move in np.abs(
            draw_prompts(labelled(labels), 1, CODED_GROWTH, rng()).boxes[0] - (180, 200, 320, 300)
        )
    }
    assert moves <= {2.0 * k for k in range(20)}
    assert max(moves) > 20  # beyond the paper's 10 px of this image


def test_every_object_comes_once_if_there_is_room():
    labels = np.zeros((60, 60))
    for number in range(1, 7):
        labels[number * 8 : number * 8 + 5, 5:40] = number
    prompts = draw_prompts(labelled(labels), 6, NO_GROWTH, rng())
    assert sorted(float(y) for y in prompts.boxes[:, 1]) == [8.0 * k for k in range(1, 7)]


def test_few_prompts_of_many_objects_vary_in_size():
    labels = np.zeros((200, 200))
    for number in range(8):  # as many small objects as large ones
        labels[5, number * 24 : number * 24 + 17] = number + 1
        labels[
            20 + number // 4 * 60 : 70 + number // 4 * 60, number % 4 * 48 : number % 4 * 48 + 40
        ] = number + 100
    for _ in range(20):
        sizes = draw_prompts(labelled(labels), 2, NO_GROWTH, rng()).masks.sum((1, 2))
        assert sorted(sizes.tolist()) == [17, 2000]
    chosen = {draw_prompts(labelled(labels), 2, NO_GROWTH, rng()).boxes.tobytes() for _ in range(9)}
    assert len(chosen) > 2


def test_the_draw_repeats_itself():
    sample = Synthetic(3).sample(1)
    seed = int(rng().integers(2**31))
    first, second = (
        draw_prompts(sample, 4, PAPER_GROWTH, np.random.default_rng(seed), split=0.5)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.boxes, second.boxes)
    np.testing.assert_array_equal(first.masks, second.masks)


def test_a_label_of_two_pieces_can_stand_for_one_of_them():
    labels = np.zeros((50, 80))
    labels[10:20, 5:25] = labels[15:40, 50:70] = 4
    whole = draw_prompts(labelled(labels), 1, NO_GROWTH, rng())
    assert whole.boxes.tolist() == [[5, 10, 70, 40]]
    seen = set()
    for _ in range(30):
        part = draw_prompts(labelled(labels), 1, NO_GROWTH, rng(), split=1.0)
        seen.add(tuple(part.boxes[0].tolist()))
        assert part.masks.sum() in (200, 500)
    assert seen == {(5, 10, 25, 20), (50, 15, 70, 40)}


def test_pieces_that_lie_in_one_anothers_box_stay_together():
    labels = np.zeros((60, 60))
    labels[5:55, 5:55] = 1
    labels[10:50, 10:50] = 0
    labels[20:40, 20:40] = 1  # inside the ring's box; the ring is not inside this one's
    for _ in range(10):
        part = draw_prompts(labelled(labels), 1, NO_GROWTH, rng(), split=1.0)
        assert part.boxes.tolist() == [[20, 20, 40, 40]]


def test_small_objects_are_never_asked_for():
    labels = np.zeros((30, 30))
    labels[0, :15] = 1
    labels[10:20, 10:20] = 2
    prompts = draw_prompts(labelled(labels), 5, NO_GROWTH, rng())
    assert prompts.boxes.tolist() == [[10, 10, 20, 20]]


def test_samples_that_cannot_be_asked_about():
    with pytest.raises(InputError, match="s has no labels"):
        draw_prompts(Sample("s", np.zeros((9, 9, 3), np.uint8), None), 1, NO_GROWTH, rng())
    with pytest.raises(InputError, match="0 objects to choose 2 from"):
        draw_prompts(labelled(np.zeros((9, 9))), 2, NO_GROWTH, rng())
    with pytest.raises(InputError, match="1 objects to choose 0 from"):
        draw_prompts(labelled(np.ones((9, 9))), 0, NO_GROWTH, rng())


@pytest.mark.parametrize(
    "settings",
    [{"px": -1}, {"px": 300, "frame": 256}, {"px": float("nan")}, {"px": 0, "whole": True}],
)
def test_growth_out_of_range(settings):
    with pytest.raises(InputError, match="box growth of"):
        Growth(**settings)
