"""Outlines that the image alone carries to the next slice."""

from __future__ import annotations

import numpy as np
import pytest

from dbsam_deploy.volumes.transfer import transferred


def disc(side: int, row: float, column: float, radius: float) -> np.ndarray:
    y, x = np.mgrid[:side, :side]
    return (y - row) ** 2 + (x - column) ** 2 <= radius**2


def drawn(mask: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 4, mask.shape)
    return (np.where(mask, 140, 90) + noise).clip(0, 255).astype(np.uint8)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


@pytest.mark.parametrize("side", [96, 256, 301])
def test_an_object_that_moves_and_shrinks_is_found_at_any_size(side: int) -> None:
    part = side / 96
    before = disc(side, 40 * part, 40 * part, 15 * part)
    after = disc(side, 43 * part, 38 * part, 13 * part)
    likeness = transferred(drawn(before, 0), drawn(after, 1), before, (3.0, 1 / part, 1 / part))
    assert likeness.shape == (side, side)
    assert likeness.dtype == np.float32
    assert likeness.min() >= 0
    assert likeness.max() <= 1
    assert dice(likeness > 0.5, after) > 0.95
    assert dice(before, after) < 0.88


def test_colour_counts_as_its_brightness() -> None:
    before, after = disc(64, 30, 30, 10), disc(64, 32, 30, 10)
    grey = drawn(before, 0), drawn(after, 1)
    colour = [np.repeat(plane[..., None], 3, 2) for plane in grey]
    np.testing.assert_array_equal(transferred(*colour, before), transferred(*grey, before))


def test_nothing_further_than_an_outline_moves_is_taken_for_it() -> None:
    before = disc(96, 30, 30, 8)
    after = disc(96, 30, 30, 8) | disc(96, 70, 70, 8)  # another one of the same kind
    likeness = transferred(drawn(before, 0), drawn(after, 1), before, (2.0, 1.0, 1.0))
    assert likeness[60:, 60:].max() == 0
    assert dice(likeness > 0.5, before) > 0.95


def test_an_object_at_the_edge_and_an_empty_mask() -> None:
    before = disc(64, 0, 63, 12)
    likeness = transferred(drawn(before, 0), drawn(before, 1), before)
    assert dice(likeness > 0.5, before) > 0.95
    empty = np.zeros((64, 64), bool)
    assert not transferred(drawn(before, 0), drawn(before, 1), empty).any()
