"""Where a mask lies."""

from __future__ import annotations

import numpy as np
import pytest

from dbsam_deploy.core.masks import extent_of, mask_box


def test_an_extent_of_any_number_of_axes() -> None:
    mask = np.zeros((6, 7, 8), np.uint8)
    assert extent_of(mask) is None
    mask[2, 3, 7] = mask[4, 3, 1] = 9
    assert extent_of(mask) == ((2, 5), (3, 4), (1, 8))
    assert extent_of(np.zeros((0, 4), bool)) is None


def test_a_box_encloses_whole_pixels() -> None:
    mask = np.zeros((6, 7), bool)
    mask[1, 5] = mask[3, 2] = True
    np.testing.assert_array_equal(mask_box(mask), [2, 1, 6, 4])
    with pytest.raises(ValueError, match="empty"):
        mask_box(mask & False)
