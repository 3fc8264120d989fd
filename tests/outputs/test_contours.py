"""Contours hold the centres of a mask's pixels, and no others, whoever fills them."""

import time

import numpy as np
import pytest
from matplotlib.path import Path as Polygon

from dbsam_deploy.outputs.contours import contours_of

pytest.importorskip("contourpy")

RING = np.zeros((9, 11), bool)
RING[1:8, 2:9] = True
RING[3:6, 4:7] = False
ISLAND = RING.copy()
ISLAND[4, 5] = True
EDGES = np.ones((4, 5), bool)
EDGES[1:3, 1:4] = False
MASKS = {
    "one pixel": np.eye(1, 1, dtype=bool),
    "whole image": np.ones((3, 4), bool),
    "two pieces that touch at a corner": np.eye(2, dtype=bool),
    "ring": RING,
    "island in a ring": ISLAND,
    "along all edges": EDGES,
    "chessboard": np.indices((6, 7)).sum(axis=0) % 2 == 0,
    "many holes": np.pad(np.indices((9, 9)).max(axis=0) % 2 == 0, 1, constant_values=True),
}


def by_parity(shape: tuple[int, int], rings: list[np.ndarray]) -> np.ndarray:
    y, x = np.indices(shape)
    centres = np.stack([x.ravel(), y.ravel()], axis=1)
    hits = [Polygon(ring).contains_points(centres) for ring in rings]
    return np.logical_xor.reduce(hits, axis=0).reshape(shape)


def by_winding(shape: tuple[int, int], rings: list[np.ndarray]) -> np.ndarray:
    """Times that a contour goes around each centre, summed over angles."""
    y, x = np.indices(shape)
    turns = np.zeros(shape)
    for ring in rings:
        around = np.arctan2(ring[:, 1] - y[..., None], ring[:, 0] - x[..., None])
        steps = np.diff(around, axis=-1, append=around[..., :1])
        turns += ((steps + np.pi) % (2 * np.pi) - np.pi).sum(axis=-1) / (2 * np.pi)
    return np.abs(turns) > 0.5


def by_whole_pixels(shape: tuple[int, int], rings: list[np.ndarray]) -> np.ndarray:
    cv2 = pytest.importorskip("cv2", exc_type=ImportError)
    filled = np.zeros(shape, np.uint8)
    cv2.fillPoly(filled, [np.around(ring).astype(np.int32) for ring in rings], 1)
    return filled.astype(bool)


READERS = [by_parity, by_winding, by_whole_pixels]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_read_back(name: str, reader: object) -> None:
    mask = MASKS[name]
    assert np.array_equal(reader(mask.shape, contours_of(mask)), mask)


@pytest.mark.parametrize("reader", READERS)
def test_noise_of_any_density_is_read_back(reader: object, rng: np.random.Generator) -> None:
    for density in (0.1, 0.4, 0.6, 0.8, 0.95):
        mask = rng.random((24, 31)) < density
        assert np.array_equal(reader(mask.shape, contours_of(mask)), mask), density


def test_an_empty_mask_has_no_contour_and_a_piece_has_one() -> None:
    assert contours_of(np.zeros((3, 4), bool)) == []
    assert [len(contours_of(MASKS[name])) for name in ("ring", "island in a ring")] == [1, 2]


def test_straight_lines_have_two_ends_only() -> None:
    (ring,) = contours_of(np.ones((50, 60), bool))
    assert len(ring) == 8  # a rectangle whose corners are cut


def test_thousands_of_holes_take_no_longer_than_a_moment(rng: np.random.Generator) -> None:
    """Noise of a bad model: joined by comparing all corners with all others they took minutes."""
    mask = rng.random((512, 512)) < 0.85
    start = time.process_time()
    rings = contours_of(mask)
    assert time.process_time() - start < 10
    corners = [ring - np.roll(ring, 1, axis=0) for ring in rings]
    areas = [
        abs(np.cross(np.c_[ring, ring[:, 0] * 0], np.c_[step, step[:, 0] * 0])[:, 2].sum()) / 2
        for ring, step in zip(rings, corners, strict=True)
    ]
    assert sum(areas) == pytest.approx(mask.sum(), rel=0.1)  # corners are cut
