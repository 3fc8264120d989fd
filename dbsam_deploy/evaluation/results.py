"""What an evaluation found: scores by object, case and task, and their means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from ..core.imaging import ByteArray
from .metrics import BoolArray

Dimensions = Literal["2D", "3D", "mixed"]
IntervalUnit = Literal["objects", "cases", "files", "tasks"]


@dataclass(frozen=True)
class Score:
    """Overlap with the truth, 0–1, and the same for the prompt itself.

    Attributes:
        dsc: Dice similarity coefficient of the prediction.
        nsd: normalised surface distance (surface Dice); None where it was not asked for.
        box_dsc: Dice of the filled box: what a model reaches that only repeats its prompt.
        box_nsd: surface Dice of the filled box.
        oracle_dsc: one-prompt alone: Dice of the model with a box on each of the object's slices.
        cvpr24_dsc: one-prompt alone: Dice of the propagation of `cvpr24`.
        hd95: of a case in medsam alone: 95th percentile of the surfaces' distance, in the unit of
            the case's tolerance.
        volume_error: of a case in medsam alone: difference of the volumes over the truth's.
    """

    dsc: float
    nsd: float | None
    box_dsc: float
    box_nsd: float | None
    oracle_dsc: float | None = None
    cvpr24_dsc: float | None = None
    hd95: float | None = None
    volume_error: float | None = None


@dataclass(frozen=True)
class ObjectResult:
    """One object: a label on one slice, or for a volume in `cvpr24` a label in the volume.

    Attributes:
        task: the data folder's name.
        file: the case file, relative to the data folder.
        label: value in the file's label map.
        label_name: the file's own name for it, or empty.
        slice_index: slice, from 0; None for a whole volume.
        pixels: size of the truth in the protocol's frame.
        box: x0, y0, x1, y1 in the protocol's frame; for a volume x0, y0, z0, x1, y1, z1.
        score: of the object.
        predicted_iou: the model's own estimate of the mask's IoU; None for a volume's object, whose
            mask is made of many.
    """

    task: str
    file: str
    label: int
    label_name: str
    slice_index: int | None
    pixels: int
    box: tuple[float, ...]
    score: Score
    predicted_iou: float | None = None

    @property
    def true_iou(self) -> float:
        """IoU with the truth, which follows from the Dice."""
        return self.score.dsc / (2 - self.score.dsc)


@dataclass(frozen=True)
class CaseResult:
    """One case, as the protocol forms it.

    Attributes:
        task: the data folder's name.
        name: file, with label or slice where a file holds several cases.
        file: the case file, relative to the data folder.
        label_name: the one label that the case is about; empty where it is about all of them.
        dimensions: whether its score is of an image (`2D`) or a volume (`3D`).
        slices: slices that were segmented.
        objects: objects in it.
        tolerance: of the NSD, in words.
        score: of the case.
    """

    task: str
    name: str
    file: str
    label_name: str
    dimensions: Literal["2D", "3D"]
    slices: int
    objects: int
    tolerance: str
    score: Score


@dataclass(frozen=True)
class Interval:
    """Bootstrap confidence interval of a mean.

    Attributes:
        low: lower end.
        high: upper end.
        unit: what was drawn with replacement.
        level: confidence level.
    """

    low: float
    high: float
    unit: IntervalUnit
    level: float = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean score with its intervals; None where there is too little to draw from."""

    score: Score
    count: int
    unit: IntervalUnit
    dsc_interval: Interval | None
    nsd_interval: Interval | None


@dataclass(frozen=True)
class TaskResult:
    """One task.

    Attributes:
        task: the data folder's name.
        dimensions: of its cases.
        cases: number of cases.
        objects: number of objects.
        mean: over cases, or over objects in the protocol `objects`.
    """

    task: str
    dimensions: Dimensions
    cases: int
    objects: int
    mean: Mean

    @property
    def below_box(self) -> bool:
        """Whether the prediction is no better than its prompt: Dice at or below the box's own."""
        return self.mean.score.dsc <= self.mean.score.box_dsc


@dataclass(frozen=True)
class Skipped:
    """What was left out, why, and how often."""

    task: str
    file: str
    reason: str
    count: int


@dataclass(frozen=True)
class Overlay:
    """The slice of an object for a picture.

    Attributes:
        result: the object.
        slice_index: slice of the file.
        image: (H, W, 3) uint8 RGB in the protocol's frame.
        truth: (H, W).
        prediction: (H, W).
        box: x0, y0, x1, y1 on this slice, in the protocol's frame.
    """

    result: ObjectResult
    slice_index: int
    image: ByteArray
    truth: BoolArray
    prediction: BoolArray
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Summary:
    """Means over everything; None where there is nothing of the kind.

    Attributes:
        objects: mean over all objects.
        cases: mean over all cases.
        tasks: mean over the tasks' scores.
        tasks_3d: the same over the tasks made of volumes, as in the paper's 3D table.
        tasks_2d: the same over the tasks made of images, as in the paper's 2D table.
        tasks_above_box: tasks whose Dice is above their box's own.
    """

    objects: Mean
    cases: Mean
    tasks: Mean
    tasks_3d: Mean | None
    tasks_2d: Mean | None
    tasks_above_box: int


@dataclass(frozen=True)
class EvaluationResult:
    """Everything that one run found.

    Attributes:
        settings: protocol, boxes, tolerance, seed and limits, see `EvaluationProtocol.describe`.
        objects: in the order of the files.
        cases: in the order of the files.
        tasks: by name.
        summary: means over everything.
        skipped: nothing is left out silently.
        worst: objects with the lowest Dice, at most two a task; empty unless asked for.
        intensities: file → how its values became 0–255.
    """

    settings: dict[str, Any]
    objects: tuple[ObjectResult, ...]
    cases: tuple[CaseResult, ...]
    tasks: tuple[TaskResult, ...]
    summary: Summary
    skipped: tuple[Skipped, ...]
    worst: tuple[Overlay, ...] = ()
    intensities: dict[str, str] = field(default_factory=dict)

    @property
    def object_mean(self) -> float:
        """Mean Dice over all objects."""
        return self.summary.objects.score.dsc

    @property
    def task_mean(self) -> float:
        """Mean over the tasks' Dice."""
        return self.summary.tasks.score.dsc

    def as_dict(self) -> dict[str, Any]:
        """For JSON; pictures are left out."""
        return {
            "settings": self.settings,
            "intensities": self.intensities,
            "summary": asdict(self.summary),
            "tasks": [{**asdict(t), "below_box": t.below_box} for t in self.tasks],
            "cases": [asdict(case) for case in self.cases],
            "objects": [asdict(item) for item in self.objects],
            "skipped": [asdict(item) for item in self.skipped],
        }


def mean_score(scores: Iterable[Score]) -> Score:
    """Mean of each figure; an NSD that one score lacks is None."""
    found = list(scores)
    return Score(
        float(np.mean([score.dsc for score in found])),
        _mean_or_none([score.nsd for score in found]),
        float(np.mean([score.box_dsc for score in found])),
        _mean_or_none([score.box_nsd for score in found]),
        _mean_or_none([score.oracle_dsc for score in found]),
        _mean_or_none([score.cvpr24_dsc for score in found]),
        _mean_or_none([score.hd95 for score in found]),
        _mean_or_none([score.volume_error for score in found]),
    )


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return float(np.mean(given)) if len(given) == len(values) else None
