"""Tables of resizing: what an element is made of, and how many taps that takes."""

from __future__ import annotations

import numpy as np
import pytest

from dbsam_deploy.core.contract import MASK_TAPS, MAX_SIDE_IN_GRAPH, encoder_spec
from dbsam_deploy.core.imaging import MODES, Preprocessing, mask_stages
from dbsam_deploy.core.taps import FIXED_POINT, equal_taps, image_taps, mask_taps
from dbsam_deploy.engines.profiles import plan_ranges

FILTERS = [mode for mode in MODES if mode != "medsam"]


@pytest.mark.parametrize("mode", FILTERS)
@pytest.mark.parametrize(("source", "count"), [(1, 5), (7, 64), (64, 64), (100, 33), (2048, 60)])
def test_weights_of_an_element_are_one_in_all_and_none_is_behind_the_last(mode, source, count):
    taps = image_taps(mode, source, count, 64)
    assert taps.places.shape == taps.weights.shape
    assert (taps.places >= 0).all()
    assert (taps.places < source).all()
    one = 1 if mode in ("sam2", "lite_medsam") else FIXED_POINT
    np.testing.assert_allclose(taps.weights[:count].sum(1), one, rtol=3e-6)
    assert not taps.weights[count:].any()


@pytest.mark.parametrize("mode", FILTERS)
@pytest.mark.parametrize("side", [64, 256, 1024])
def test_no_image_has_more_taps_than_an_engine_is_built_for(mode, side):
    how = Preprocessing(side, mode, pixels_in_graph=True)
    most = plan_ranges(encoder_spec(how))["num_row_taps"].most
    for size in [(MAX_SIDE_IN_GRAPH, n) for n in (1, 3, 47, 700, MAX_SIDE_IN_GRAPH)]:
        for axis, count in enumerate(how.pixel_size(size)):
            assert image_taps(mode, size[axis], count, side).places.shape[1] <= most


def test_halved_by_area_a_half_is_rounded_up():
    halved = image_taps("lite_medsam", 128, 64, 64, halved=True)
    means = (np.float32([[0, 1], [254, 255], [3, 3]]) * halved.weights[0]).sum(1)
    assert np.rint(means).tolist() == [1, 255, 3]
    plain = image_taps("lite_medsam", 128, 64, 64)
    assert np.rint((np.float32([0, 1]) * plain.weights[0]).sum()) == 0


def test_digits_of_a_value_lie_side_by_side():
    taps = equal_taps(3, 4, 1, 2)
    assert taps.places.tolist() == [[0, 3], [1, 4], [2, 5], [0, 0]]
    assert taps.weights.tolist() == [[1, 1 / 256]] * 3 + [[0, 0]]


@pytest.mark.parametrize("mode", ["sam", "medsam2"])
@pytest.mark.parametrize("size", [(1, 9), (300, 77), (640, 480)])
def test_a_masks_pixel_depends_on_few_logits(mode, size):
    how = Preprocessing(256, mode)
    for axis in (0, 1):
        taps = mask_taps(how.mask_side, mask_stages(size, how), axis, size[axis] + 3)
        assert taps.weights.shape == (size[axis] + 3, MASK_TAPS)
        np.testing.assert_allclose(taps.weights[: size[axis]].sum(1), 1, rtol=1e-6)
        assert not taps.weights[size[axis] :].any()
    assert taps.in_rows_of(1).places.shape == (size[1] + 3, 1, MASK_TAPS)
