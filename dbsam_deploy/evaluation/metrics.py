"""Dice, surface Dice, distances and intervals: MONAI's and SciPy's, behind plain NumPy arrays.

Surface Dice is MONAI's `compute_surface_dice` with sub-voxel surface elements, which is DeepMind's
definition (the one of the Medical Segmentation Decathlon, MedSAM and the CVPR 2024 challenge). The
`surface-distance` package itself agrees to seven digits where it still runs, but its only release
(0.1) calls names that NumPy 2 and SciPy 2 removed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..extras import require

BoolArray = npt.NDArray[np.bool_]

RESAMPLES = 2000
LEVEL = 0.95
_BATCH = 100
"""Resamples held in memory at once."""


def load_library(name: str) -> ModuleType:
    """Import a package of the `eval` extra.

    Raises:
        MissingError: it is not installed.
    """
    return require(name, extra="eval", what_for="evaluation")


def dice(prediction: npt.NDArray[Any], truth: npt.NDArray[Any]) -> float:
    """Dice of two masks of one shape, any number of axes; 1 if both are empty, 0 if one is.

    Raises:
        InputError: different shapes.
        EngineError: MONAI is not installed.
    """
    _check_shapes(prediction, truth)
    value = load_library("monai.metrics").compute_dice(
        _batch(prediction.reshape(1, -1)), _batch(truth.reshape(1, -1)), ignore_empty=False
    )
    return float(value)


def surface_dice(
    prediction: npt.NDArray[Any],
    truth: npt.NDArray[Any],
    tolerance: float,
    spacing: Sequence[float] | None = None,
) -> float:
    """Share of both surfaces that lies within `tolerance` of the other; 1 if both are empty.

    Args:
        prediction: (H, W) or (D, H, W), nonzero inside.
        truth: the same shape.
        tolerance: in the unit of `spacing`.
        spacing: distance between voxels along each axis; 1 by default.

    Raises:
        InputError: different shapes, or a spacing for another number of axes.
        EngineError: MONAI is not installed.
    """
    _check_shapes(prediction, truth)
    steps = [1.0] * truth.ndim if spacing is None else [float(step) for step in spacing]
    if len(steps) != truth.ndim or truth.ndim not in (2, 3):
        raise InputError(f"spacing {steps} for masks of shape {truth.shape}: expected one an axis")
    present = bool(np.any(prediction)), bool(np.any(truth))
    if not all(present):
        return 0.0 if any(present) else 1.0
    metrics = load_library("monai.metrics")
    with _quiet():
        value = metrics.compute_surface_dice(
            _batch(prediction),
            _batch(truth),
            class_thresholds=[float(tolerance)],
            include_background=True,
            spacing=steps,
            use_subvoxels=True,
        )
    return float(value)


def hausdorff_95(
    prediction: npt.NDArray[Any],
    truth: npt.NDArray[Any],
    spacing: Sequence[float] | None = None,
) -> float:
    """95th percentile of the distances between both surfaces, the larger of the two directions.

    One mask without the other counts as the diagonal of the array, as far as anything can be; two
    empty ones as 0.

    Args:
        prediction: (H, W) or (D, H, W), nonzero inside.
        truth: the same shape.
        spacing: distance between voxels along each axis, in whose unit the result is; 1 by default.

    Raises:
        InputError: different shapes.
        EngineError: MONAI is not installed.
    """
    _check_shapes(prediction, truth)
    steps = [1.0] * truth.ndim if spacing is None else [float(step) for step in spacing]
    present = bool(np.any(prediction)), bool(np.any(truth))
    if not all(present):
        return float(np.linalg.norm(np.multiply(truth.shape, steps))) if any(present) else 0.0
    metrics = load_library("monai.metrics")
    masks = _batch(prediction), _batch(truth)
    with _quiet():
        value = metrics.compute_hausdorff_distance(
            *masks, include_background=True, percentile=95, spacing=steps
        )
    return float(value)


def volume_error(prediction: npt.NDArray[Any], truth: npt.NDArray[Any]) -> float:
    """How far the volume is off, as a share of the truth's, which is not empty."""
    _check_shapes(prediction, truth)
    known = np.count_nonzero(truth)
    return abs(np.count_nonzero(prediction) - known) / known


@contextmanager
def _quiet() -> Iterator[None]:
    """MONAI 1.5 and 1.6 warn of their own calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _check_shapes(prediction: npt.NDArray[Any], truth: npt.NDArray[Any]) -> None:
    if prediction.shape != truth.shape:
        raise InputError(f"prediction of shape {prediction.shape} for truth of {truth.shape}")


def _batch(mask: npt.NDArray[Any]) -> Any:
    """A mask as the (1, 1, ...) float tensor that MONAI's metrics take."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(mask != 0)).float()[None, None]


def bootstrap_mean(values: Sequence[float], seed: int) -> tuple[float, float] | None:
    """Percentile interval of the mean; None for fewer than two values.

    Raises:
        EngineError: SciPy is not installed.
    """
    if len(values) < 2:
        return None
    return _bootstrap((np.asarray(values, np.float64),), np.mean, seed)


def bootstrap_grouped(groups: Sequence[Sequence[float]], seed: int) -> tuple[float, float] | None:
    """The same for the mean over all values, where whole groups are drawn; None below two groups.

    Values of one group (objects of one case) resemble one another, so drawing them one by one would
    give an interval that is too narrow.
    """
    if len(groups) < 2:
        return None
    sums = np.array([np.sum(group) for group in groups], np.float64)
    counts = np.array([len(group) for group in groups], np.float64)

    def ratio(sums: Any, counts: Any, axis: int) -> Any:
        return np.sum(sums, axis=axis) / np.sum(counts, axis=axis)

    return _bootstrap((sums, counts), ratio, seed)


def _bootstrap(
    samples: tuple[npt.NDArray[np.float64], ...], statistic: Any, seed: int
) -> tuple[float, float]:
    found = (
        load_library("scipy.stats")
        .bootstrap(
            samples,
            statistic,
            paired=len(samples) > 1,
            vectorized=True,
            method="percentile",  # the default's correction is undefined where all values are equal
            n_resamples=RESAMPLES,
            batch=_BATCH,
            confidence_level=LEVEL,
            rng=np.random.default_rng(seed),
        )
        .confidence_interval
    )
    return float(found.low), float(found.high)
