"""What an export records of its weights' understanding of points, from the images of its gate."""

from __future__ import annotations

from typing import Any

from ..core.points import BOX_TRAINED, NATIVE, POINTS
from .parity import Figures

LEAST_OBJECTS = 4
LEAST_DICE = 0.3
"""From a box; below, these images say nothing about the weights."""


def measured_points(figures: Figures, weights: dict[str, Any]) -> dict[str, Any]:
    """The record of `core.points`: measured where the images allow it, else that of the weights.

    Weights understand points if most masks of a point hold it, and are half as good as a box's.

    Args:
        figures: of the gate.
        weights: of the model, with the record of their kind.
    """
    enough = figures.objects >= LEAST_OBJECTS and figures.dice >= LEAST_DICE
    if not weights["trained"] or not enough:
        usual: dict[str, Any] = weights[POINTS]
        return usual
    understood = figures.points_obeyed >= 0.5 and figures.point_dice >= 0.5 * figures.dice
    return (NATIVE if understood else BOX_TRAINED).record(
        f"measured by the export on {figures.objects} objects: from the decoder's answer to a "
        f"point Dice {figures.point_dice:.2f}, {figures.points_obeyed:.0%} hold it; from a box "
        f"{figures.dice:.2f}"
    )
