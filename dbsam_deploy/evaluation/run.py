"""What every protocol's pass over a case shares: the model, limits, scoring and the worst cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..images.overlays import evenly_spaced
from ..prediction.segment import Progress
from .metrics import BoolArray, dice, surface_dice
from .protocols import EvaluationProtocol
from .results import CaseResult, ObjectResult, Overlay, Score, Skipped
from .segmenters import BoxSegmenter

WORST_PER_TASK = 2


@dataclass
class Gallery:
    """Keeps the objects with the lowest Dice, at most `WORST_PER_TASK` a task.

    Args:
        capacity: how many; 0 keeps none.
    """

    capacity: int = 0
    _by_task: dict[str, list[Overlay]] = field(default_factory=dict)

    def offer(self, overlay: Overlay) -> None:
        """Keep a picture if it is among the worst of its task so far."""
        kept = self._by_task.setdefault(overlay.result.task, [])
        dsc = overlay.result.score.dsc
        if not self.capacity or (len(kept) == WORST_PER_TASK and dsc >= kept[-1].result.score.dsc):
            return
        # Copies, since the masks are parts of much larger arrays.
        truth, prediction = overlay.truth.copy(), overlay.prediction.copy()
        kept.append(replace(overlay, truth=truth, prediction=prediction))
        kept.sort(key=lambda item: item.result.score.dsc)
        del kept[WORST_PER_TASK:]

    def worst(self) -> tuple[Overlay, ...]:
        """The worst of all tasks, lowest Dice first."""
        found = [overlay for kept in self._by_task.values() for overlay in kept]
        found.sort(key=lambda overlay: overlay.result.score.dsc)
        return tuple(found[: self.capacity])


@dataclass(frozen=True)
class Run:
    """One evaluation in progress.

    Attributes:
        segmenter: the model.
        protocol: what is measured.
        max_slices: most slices of a file, for a quick look; None for all.
        with_nsd: whether surfaces are compared too, which takes most of the time without a model.
        gallery: for the worst cases.
        progress: called with slices done and slices in all of the present file.
    """

    segmenter: BoxSegmenter
    protocol: EvaluationProtocol
    max_slices: int | None
    with_nsd: bool
    gallery: Gallery
    progress: Progress

    def choose(self, slices: Sequence[int]) -> list[int]:
        """The slices to segment, spread evenly; a single one is the middle one."""
        if self.max_slices == 1 and slices:
            return [slices[len(slices) // 2]]
        return list(slices) if self.max_slices is None else evenly_spaced(slices, self.max_slices)

    def score(
        self,
        prediction: npt.NDArray[Any],
        truth: npt.NDArray[Any],
        box: npt.NDArray[Any],
        spacing: Sequence[float] | None = None,
    ) -> Score:
        """Compare prediction and filled box with the truth, all (H, W) or all (D, H, W)."""
        tolerance = self.protocol.tolerance
        nsd = [
            surface_dice(mask, truth, tolerance, spacing) if self.with_nsd else None
            for mask in (prediction, box)
        ]
        return Score(dice(prediction, truth), nsd[0], dice(box, truth), nsd[1])


@dataclass(frozen=True)
class CaseOutcome:
    """What one file gave."""

    objects: tuple[ObjectResult, ...]
    cases: tuple[CaseResult, ...]
    skipped: tuple[Skipped, ...]


def as_bool(masks: npt.NDArray[Any]) -> BoolArray:
    """Nonzero pixels."""
    return np.asarray(masks != 0)
