"""Drawn slices on which an object widens, with and without a brightness of its own."""

from __future__ import annotations

import numpy as np
import pytest

from dbsam_deploy.volumes.contrast import GROWTH_PX, Contrast


def disc(size: int, radius: float, centre: tuple[float, float]) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return np.hypot(y - centre[0], x - centre[1]) < radius


def drawn(mask: np.ndarray, grey: float, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 6, mask.shape)
    return (np.where(mask, grey, 100) + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [96, 300])
def test_an_outline_grows_over_what_has_the_objects_brightness_and_no_further(
    seed: int, size: int
) -> None:
    centre = np.random.default_rng(seed).uniform(0.4, 0.6, 2) * size
    one = size / 96
    first, wider = disc(size, 14 * one, centre), disc(size, 16 * one, centre)
    contrast = Contrast.of(drawn(first, 170, seed), first)
    assert contrast is not None
    pixels = drawn(wider, 170, seed + 10)
    grown = contrast.grown(first, pixels)
    assert (grown & first).sum() == first.sum()
    assert np.count_nonzero(grown & wider) > 0.97 * np.count_nonzero(wider)
    assert np.count_nonzero(grown & ~wider) < 0.08 * np.count_nonzero(wider)

    everywhere = np.full_like(pixels, 170)  # nothing holds it but its reach
    reached = contrast.grown(first, everywhere)
    assert not (reached & ~disc(size, (14 + GROWTH_PX + 2) * one, centre)).any()


def test_a_bridge_to_something_alike_is_not_crossed() -> None:
    first = disc(96, 12, (48, 40))
    with_bridge = first | disc(96, 12, (48, 70))
    with_bridge[48, 40:70] = True
    contrast = Contrast.of(drawn(first, 170, 0), first)
    assert contrast is not None
    grown = contrast.grown(first, drawn(with_bridge, 170, 1))
    assert np.count_nonzero(grown & ~first) < 0.05 * np.count_nonzero(first)


def test_an_object_as_bright_as_its_surroundings_has_no_contrast() -> None:
    first = disc(96, 14, (48, 48))
    assert Contrast.of(drawn(first, 104, 0), first) is None
    assert Contrast.of(drawn(first, 170, 0), np.ones_like(first)) is None  # nothing is around it
    assert Contrast.of(drawn(first, 170, 0), first) is not None


def test_colour_is_taken_as_grey() -> None:
    first = disc(96, 14, (48, 48))
    pixels = drawn(first, 170, 0)
    grey, colour = (Contrast.of(p, first) for p in (pixels, np.repeat(pixels[..., None], 3, 2)))
    assert grey is not None
    assert colour is not None
    np.testing.assert_array_equal(grey.odds, colour.odds)
