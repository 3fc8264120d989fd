"""Slices along any axis as a model sees them, and its masks in stored voxels."""

from pathlib import Path

import numpy as np
import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.intensity import STORED
from dbsam_deploy.images.volumes import Volume
from dbsam_deploy.volumes.planes import view, view_along


def volume(shape: tuple[int, int, int], spacing: tuple[float, ...] | None) -> Volume:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return Volume(Path("a.npz"), "npz", pixels, STORED, spacing_mm=spacing)


@pytest.mark.parametrize(
    ("spacing", "squares"),
    [
        ((5, 1, 1), [(6, 7), (20, 7), (20, 6)]),
        ((1, 2, 1), [(12, 7), (4, 7), (4, 12)]),
        ((1, 1.005, 1), [(6, 7), (4, 7), (4, 6)]),  # square but for rounding
        ((1, 1, 3), [(6, 21), (4, 21), (4, 6)]),
    ],
)
def test_the_coarser_side_is_enlarged(spacing, squares):
    scan = volume((4, 6, 7), spacing)
    views = [view_along(scan, axis) for axis in range(3)]
    assert [one.square for one in views] == squares
    assert [one.size for one in views] == [(6, 7), (4, 7), (4, 6)]
    assert [one.depth for one in views] == [4, 6, 7]
    for one in views:
        assert one.image(1).shape == (*one.square, 3)
        rows, columns = one.size
        corner = one.to_square(np.array([[columns, rows]]))
        np.testing.assert_allclose(corner[0], one.square[::-1])
        if one.square == one.size:
            np.testing.assert_array_equal(one.image(1)[..., 0], one.pixels(1))


def test_a_voxel_is_inside_if_half_of_it_is():
    across = view(volume((4, 6, 7), (5, 1, 1)), "coronal")
    mask = np.zeros((1, 1, *across.square), np.uint8)
    mask[..., 0:2, 0], mask[..., 5:8, 1], mask[..., 18:20, 2], mask[..., 10:15, 3] = 1, 1, 1, 1
    found = across.to_stored(mask)[0, 0]
    assert np.argwhere(found).tolist() == [[1, 1], [2, 3]]
    assert across.spacing_mm == (1, 5, 1)


def test_a_spacing_that_cannot_be_does_not_fill_the_memory():
    across = view_along(volume((4, 6, 7), (5, 1, 0.0001)), 1)
    assert max(across.square) <= 2048
    stored = np.zeros(across.square, np.uint8)
    stored[: across.square[0] // 2] = 1
    assert across.to_stored(stored).shape == (4, 7)


@pytest.mark.parametrize("spacing", [None, (0, 1, 1), (1, np.nan, 1), (-1, 1, 1)])
def test_an_unknown_spacing_leaves_the_stored_slices(spacing):
    scan = volume((4, 6, 7), spacing)
    assert view(scan).square == (6, 7)
    with pytest.raises(InputError, match="the distance between its voxels is unknown"):
        view(scan, "sagittal")
