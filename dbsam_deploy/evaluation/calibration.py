"""How far a model's own estimate of a mask's IoU can be believed: predicted against true IoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .results import EvaluationResult, ObjectResult

BINS = 10
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Values of `--min-confidence` of which a report says what they would do."""
POOR_DSC = 0.7
"""Objects below it are those that a reader should have been sent to."""
FIRST = 12
"""Objects that a report names as those to look at first."""


@dataclass(frozen=True)
class Bin:
    """Objects whose predicted IoU lies in one tenth of 0–1; means of them."""

    count: int
    predicted: float
    true: float


@dataclass(frozen=True)
class Flagging:
    """What a least confidence does.

    Attributes:
        least: objects with a lower predicted IoU are flagged.
        flagged: share of all objects.
        caught: share of the objects below `POOR_DSC` that are among them; None without such.
        dsc_of_rest: mean Dice of those that are not flagged; None where all are.
    """

    least: float
    flagged: float
    caught: float | None
    dsc_of_rest: float | None


@dataclass(frozen=True)
class Calibration:
    """Predicted against true IoU over the objects that have both.

    Attributes:
        count: how many.
        error: expected calibration error: mean distance of a bin's means, weighted by its objects.
        bias: mean of predicted - true; above 0 the model thinks too well of itself.
        bins: those with objects, by predicted IoU.
        flaggings: see `Flagging`, one for each of `THRESHOLDS`.
    """

    count: int
    error: float
    bias: float
    bins: tuple[Bin, ...]
    flaggings: tuple[Flagging, ...]


def calibrate(objects: Sequence[ObjectResult]) -> Calibration | None:
    """Measure over objects; None where none has a predicted IoU."""
    known = [one for one in objects if one.predicted_iou is not None]
    if not known:
        return None
    predicted = np.array([one.predicted_iou for one in known], np.float64).clip(0, 1)
    true = np.array([one.true_iou for one in known])
    dsc = np.array([one.score.dsc for one in known])
    which = np.minimum((predicted * BINS).astype(int), BINS - 1)
    bins = tuple(
        Bin(int(own.sum()), float(predicted[own].mean()), float(true[own].mean()))
        for own in (which == number for number in range(BINS))
        if own.any()
    )
    off = sum(one.count * abs(one.predicted - one.true) for one in bins) / len(known)
    flaggings = []
    for least in THRESHOLDS:
        flagged, poor = predicted < least, dsc < POOR_DSC
        caught = float(flagged[poor].mean()) if poor.any() else None
        rest = None if flagged.all() else float(dsc[~flagged].mean())
        flaggings.append(Flagging(least, float(flagged.mean()), caught, rest))
    bias = float((predicted - true).mean())
    return Calibration(len(known), float(off), bias, bins, tuple(flaggings))


def first_to_look_at(result: EvaluationResult) -> list[ObjectResult]:
    """The objects with the lowest predicted IoU, lowest first; a reader needs no truth for that."""
    known = [one for one in result.objects if one.predicted_iou is not None]
    return sorted(known, key=lambda one: one.predicted_iou or 0.0)[:FIRST]
