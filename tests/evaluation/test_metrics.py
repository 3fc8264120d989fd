"""Dice, surface Dice and intervals against masks whose figures are known."""

import re

import numpy as np
import pytest

from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.evaluation.boxes import (
    BoxGrowth,
    file_generator,
    fill_box,
    grow_box,
    tight_box,
)
from dbsam_deploy.evaluation.metrics import (
    bootstrap_grouped,
    bootstrap_mean,
    dice,
    hausdorff_95,
    load_library,
    surface_dice,
    volume_error,
)
from dbsam_deploy.extras import pip_line
from dbsam_deploy.verification.parity import dice as counted_dice


def cube(shape: tuple[int, ...], corner: tuple[int, ...], side: int = 8) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(start, start + side) for start in corner)] = True
    return mask


def test_dice_by_counting(rng: np.random.Generator) -> None:
    for shape in ((13, 7), (4, 6, 5)):
        a, b = rng.random(shape) < 0.4, rng.random(shape) < 0.6
        assert dice(a, b) == pytest.approx(counted_dice(a, b), abs=1e-6)
    assert dice(cube((20, 20), (4, 4)), cube((20, 20), (6, 4))) == pytest.approx(0.75)


@pytest.mark.parametrize("shape", [(9, 11), (3, 9, 11)])
def test_empty_masks(shape: tuple[int, ...]) -> None:
    empty, full = np.zeros(shape, bool), np.ones(shape, bool)
    for measure in (dice, lambda a, b: surface_dice(a, b, 1.0)):
        assert measure(empty, empty) == 1
        assert measure(empty, full) == 0
        assert measure(full, empty) == 0
        assert measure(full, full) == 1


def test_a_shift_within_the_tolerance_costs_nothing() -> None:
    a = cube((24, 24, 24), (5, 5, 5))
    for axis in range(3):
        moved = np.roll(a, 2, axis)
        assert surface_dice(moved, a, 2.0) == 1
        assert surface_dice(moved, a, 1.99) < 1
    assert surface_dice(np.roll(a, 12, 2), a, 2.0) == 0


def test_spacing_goes_with_the_axes() -> None:
    a = cube((24, 24, 24), (5, 5, 5))
    spacing = (3.0, 1.0, 0.5)
    for axis, step in enumerate(spacing):
        moved = np.roll(a, 1, axis)
        assert surface_dice(moved, a, step, spacing) == 1
        assert surface_dice(moved, a, 0.99 * step, spacing) < 1


KNOWN = [
    # shape, shift, spacing, tolerance, figure of DeepMind's surface-distance 0.1
    ((20, 20, 20), (2, 0, 0), (1, 1, 1), 1, 0.7334348649876016),
    ((20, 20, 20), (1, 0, 0), (3, 1, 1), 2, 0.8754009528927401),
    ((20, 20, 20), (1, 1, 1), (1, 1, 1), 1, 0.955747722926739),
    ((40, 40), (2, 0), (1, 1), 1, 0.5648751878228191),
    ((40, 40), (3, 3), (1, 1), 2, 0.32437593911409546),
    ((40, 40, 1), (2, 2, 0), (1, 1, 1), 1, 0.8342207499197717),
]


@pytest.mark.parametrize(("shape", "shift", "spacing", "tolerance", "figure"), KNOWN)
def test_figures_of_the_original_implementation(
    shape: tuple[int, ...],
    shift: tuple[int, ...],
    spacing: tuple[float, ...],
    tolerance: float,
    figure: float,
) -> None:
    corner = tuple(0 if size == 1 else 5 for size in shape)
    truth = cube(shape, corner)
    found = cube(shape, tuple(c + s for c, s in zip(corner, shift, strict=True)))
    assert surface_dice(found, truth, tolerance, spacing) == pytest.approx(figure, abs=1e-6)
    assert surface_dice(truth, found, tolerance, spacing) == pytest.approx(figure, abs=1e-6)


def test_the_distance_of_surfaces_goes_with_the_axes() -> None:
    truth = cube((12, 30, 30), (2, 8, 8))
    for axis, step in enumerate((4.0, 1.0, 0.5)):
        moved = np.roll(truth, 2, axis)
        found = hausdorff_95(moved, truth, (4.0, 1.0, 0.5))
        assert found == pytest.approx(2 * step)
        assert hausdorff_95(truth, moved, (4.0, 1.0, 0.5)) == found
    assert hausdorff_95(truth, truth) == 0
    speck = truth.copy()
    speck[11, 29, 29] = True  # one voxel far off is no twentieth of the surface
    assert hausdorff_95(speck, truth) == 0


def test_a_mask_without_the_other_is_as_far_off_as_can_be() -> None:
    truth, empty = cube((12, 30, 40), (2, 8, 8)), np.zeros((12, 30, 40), bool)
    assert hausdorff_95(empty, truth, (2.0, 1.0, 1.0)) == pytest.approx(np.sqrt(24**2 + 2500))
    assert hausdorff_95(empty, empty) == 0
    assert volume_error(empty, truth) == 1


def test_the_volumes_difference_is_a_share_of_the_truths() -> None:
    truth = cube((20, 20), (4, 4), side=10)
    assert volume_error(cube((20, 20), (4, 4), side=5), truth) == 0.75
    assert volume_error(np.ones((20, 20), bool), truth) == 3
    assert volume_error(np.roll(truth, 3, 0), truth) == 0


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="shape"):
        dice(np.ones((3, 4)), np.ones((4, 3)))
    with pytest.raises(InputError, match="spacing"):
        surface_dice(np.ones((3, 4)), np.ones((3, 4)), 1, (1, 1, 1))


def test_a_missing_library_names_the_extra() -> None:
    with pytest.raises(EngineError, match=re.escape(pip_line("eval"))):
        load_library("no_such_library_anywhere")


def test_intervals(rng: np.random.Generator) -> None:
    values = rng.random(60).tolist()
    low, high = bootstrap_mean(values, 3) or (0, 0)
    assert low < np.mean(values) < high
    assert bootstrap_mean(values, 3) == (low, high)
    assert bootstrap_mean([0.5], 0) is None
    assert bootstrap_mean([0.5, 0.5], 0) == (0.5, 0.5)


def test_values_of_one_group_are_drawn_together(rng: np.random.Generator) -> None:
    # Ten groups of twenty equal values are ten observations, not two hundred.
    levels = np.linspace(0.1, 0.9, 10)
    groups = [[float(level)] * 20 for level in levels]
    grouped = bootstrap_grouped(groups, 0)
    single = bootstrap_mean([value for group in groups for value in group], 0)
    assert grouped is not None
    assert single is not None
    assert grouped[1] - grouped[0] > 2 * (single[1] - single[0])
    assert bootstrap_grouped(groups[:1], 0) is None


def test_boxes_of_a_mask() -> None:
    mask = np.zeros((20, 30), bool)
    mask[4:9, 10:13] = True
    np.testing.assert_array_equal(tight_box(mask, inclusive=False), [10, 4, 13, 9])
    np.testing.assert_array_equal(tight_box(mask, inclusive=True), [10, 4, 12, 8])
    for inclusive in (False, True):
        box = tight_box(mask, inclusive=inclusive)
        np.testing.assert_array_equal(fill_box(box, mask.shape, inclusive=inclusive), mask)


def test_growth_by_the_documented_draws(rng: np.random.Generator) -> None:
    name = f"case_{rng.integers(10**6)}.npz"
    size = (512, 400)  # half of 1024
    box = np.array([100.0, 120.0, 200.0, 260.0])
    draws = file_generator(name).integers(0, 21, 4)
    grown = grow_box(box, size, BoxGrowth(0, 20), file_generator(name))
    np.testing.assert_allclose(grown, box + draws * np.array([-1, -1, 1, 1]) / 2)
    assert grow_box(box, size, BoxGrowth(36, 36), rng).tolist() == [82, 102, 218, 278]
    other = [grow_box(box, size, BoxGrowth(0, 20), file_generator(name, seed)) for seed in (1, 2)]
    assert not np.array_equal(*other)


def test_grown_boxes_stay_in_the_image_and_are_never_empty(rng: np.random.Generator) -> None:
    edge = grow_box(np.array([0.0, 1.0, 40.0, 30.0]), (30, 40), BoxGrowth(500, 500), rng)
    assert edge.tolist() == [0, 0, 40, 30]
    point = grow_box(np.array([39.0, 29.0, 39.0, 29.0]), (30, 40), BoxGrowth(0, 0), rng)
    assert point.tolist() == [39, 29, 40, 30]


@pytest.mark.parametrize("ends", [(-1, 3), (5, 4), (0, 2000)])
def test_a_growth_that_means_nothing_is_refused(ends: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="box growth"):
        BoxGrowth(*ends)
