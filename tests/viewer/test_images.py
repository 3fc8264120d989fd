"""What a viewer's values become for the model: 16 bits as stored, no window in the protocol."""

from __future__ import annotations

import numpy as np
import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.viewer.images import as_viewer_volume

RNG = np.random.default_rng(0)
CT = RNG.integers(-1000, 1000, (1, 3, 8, 9))


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "float32", "float64"])
def test_whole_numbers_down_to_air_are_ct_by_the_soft_tissue_window(dtype):
    volume = as_viewer_volume(CT.astype(dtype), None, None)
    expected = ((np.clip(CT[0], -160, 240) + 160) / 400 * 255).astype(np.uint8)
    np.testing.assert_array_equal(volume.pixels, expected)
    assert "soft-tissue" in str(volume.intensity)


@pytest.mark.parametrize("values", [np.abs(CT), CT + 600, CT * 1.0001])
def test_others_are_not(values):
    assert as_viewer_volume(values, None, None).intensity.how == "percentiles"


def test_a_window_of_the_server_goes_first():
    volume = as_viewer_volume(CT.astype(np.int16), None, (0, 2000))
    assert (volume.intensity.low, volume.intensity.high) == (-1000, 1000)


def test_bytes_and_bool_stay_and_what_is_not_finite_is_replaced():
    grey = np.abs(CT % 256).astype(np.uint8)
    np.testing.assert_array_equal(as_viewer_volume(grey, None, None).pixels, grey[0])
    bits = as_viewer_volume(CT > 0, None, None).pixels
    np.testing.assert_array_equal(bits, (CT[0] > 0) * 255)
    values = np.abs(CT).astype(np.float32) + 1
    values[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    pixels = as_viewer_volume(values, None, None).pixels
    assert pixels[0, 0, :3].tolist() == [0, 255, 0]


@pytest.mark.parametrize(
    "values",
    [np.zeros((1, 2, 3, 4)), np.full((1, 2, 3, 4), np.nan), np.full((1, 2, 3, 4), 7, "u2")],
)
def test_an_even_image_is_taken_and_holds_nothing(values):
    assert not as_viewer_volume(values, None, None).pixels.any()


def test_ct_outside_the_soft_tissue_window_is_shown_by_its_own_range():
    air = RNG.integers(-1000, -400, (1, 2, 8, 9)).astype(np.int16)
    assert as_viewer_volume(air, None, None).intensity.how == "percentiles"


@pytest.mark.parametrize(
    "given", [None, [1, 2], [1, 0, 1], ["a", 1, 1], [1, float("inf"), 1], 3, [9e5, 5e-324, 1]]
)
def test_a_spacing_of_another_form_is_one(given):
    assert as_viewer_volume(CT, given, None).spacing_mm == (1.0, 1.0, 1.0)
    assert as_viewer_volume(CT, [3, 1, 0.5], None).spacing_mm == (3.0, 1.0, 0.5)


def test_colours_are_refused():
    with pytest.raises(InputError, match="one channel"):
        as_viewer_volume(np.zeros((3, 4, 5, 6)), None, None)
