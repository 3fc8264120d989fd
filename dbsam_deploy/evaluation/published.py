"""Figures printed in the DB-SAM paper, shown beside ours and never mixed with them.

Source: DB-SAM (MICCAI 2024, arXiv 2410.04172), its two result tables: 21 tasks in 3D, 9 in 2D. Only
figures that are known for certain stand here: the averages of SAM, MedSAM and DB-SAM, and DB-SAM's
Dice of eleven 3D tasks. The names of the other rows are those of MedSAM's first preprint, on whose
data the paper reports; they are marked in `PaperRow.confirmed`.

The paper's test images are not ours. A row is filled from our data only where `OUR_LABELS` names
the task folder and label, or a task folder carries the row's name (spaces or underscores); nothing
is guessed from similar names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .metrics import LEVEL, bootstrap_mean
from .results import (
    CaseResult,
    EvaluationResult,
    Interval,
    IntervalUnit,
    ObjectResult,
    Score,
    mean_score,
)

SOURCE = "DB-SAM, MICCAI 2024, arXiv 2410.04172"


@dataclass(frozen=True)
class PaperRow:
    """One task of the paper.

    Attributes:
        name: as printed there.
        dimensions: which of its two tables.
        db_sam_dsc: its Dice in per cent, where known.
        confirmed: whether the name is known from the paper itself.
    """

    name: str
    dimensions: Literal["2D", "3D"]
    db_sam_dsc: float | None = None
    confirmed: bool = False


@dataclass(frozen=True)
class PaperAverage:
    """A model's average over one of the paper's tables, in per cent."""

    model: str
    dimensions: Literal["2D", "3D"]
    tasks: int
    dsc: float
    nsd: float


AVERAGES = (
    PaperAverage("DB-SAM", "3D", 21, 87.05, 85.31),
    PaperAverage("MedSAM", "3D", 21, 81.02, 76.54),
    PaperAverage("SAM", "3D", 21, 58.52, 37.49),
    PaperAverage("DB-SAM", "2D", 9, 82.00, 91.81),
    PaperAverage("MedSAM", "2D", 9, 77.22, 83.17),
    PaperAverage("SAM", "2D", 9, 59.62, 64.27),
)

_KNOWN = {
    "Brain Ventricles MR-T1": 78.95,
    "Brain Ventricles MR-T2": 77.02,
    "Brain Tumor MR-FLAIR": 92.49,
    "Cerebellum MR-T1": 94.47,
    "Cerebellum MR-T2": 92.69,
    "Gallbladder MR": 87.43,
    "Left Ventricle MR": 91.15,
    "Right Ventricle MR": 90.51,
    "Liver MR": 96.17,
    "Pancreas MR": 85.16,
    "Abdomen Tumor CT": 78.31,
}
_OTHER_3D = (
    "Prostate MR-ADC",
    "Prostate MR-T2",
    "Gallbladder CT",
    "Head-Neck Tumor CT",
    "Liver CT",
    "Lung Infections CT",
    "Pancreas CT",
    "Pleural Effusion CT",
    "Stomach CT",
    "Head-Neck Tumor PET",
)
_2D = (
    "Breast Tumor Ultrasound",
    "Liver Ultrasound",
    "Vessel Ultrasound",
    "Heart X-Ray",
    "Lungs X-Ray",
    "Polyp Endoscope",
    "Instrument Endoscope",
    "Retinal Vessel Retinal Image",
    "Gland Pathology",
)

PAPER_ROWS = (
    *(PaperRow(name, "3D", dsc, confirmed=True) for name, dsc in _KNOWN.items()),
    *(PaperRow(name, "3D") for name in _OTHER_3D),
    *(PaperRow(name, "2D") for name in _2D),
)

OUR_LABELS: dict[tuple[str, str], str] = {
    ("MR_cardiac_LV", "left ventricle (endocardial)"): "Left Ventricle MR",
    ("MR_brain_T2_structures_3D", "lateral ventricles"): "Brain Ventricles MR-T2",
    ("MR_brain_T2_structures_3D", "cerebellum"): "Cerebellum MR-T2",
    ("CT_abdomen_3D", "gallbladder"): "Gallbladder CT",
    ("CT_abdomen_3D", "liver"): "Liver CT",
    ("CT_abdomen_3D", "pancreas"): "Pancreas CT",
    ("CT_abdomen_3D", "stomach"): "Stomach CT",
    ("Endoscopy_polyp", "polyp"): "Polyp Endoscope",
    ("XRay_chest", "left lung"): "Lungs X-Ray",
    ("XRay_chest", "right lung"): "Lungs X-Ray",
}
"""Task folder and label name → the paper's row for the same structure and modality."""


@dataclass(frozen=True)
class Comparison:
    """A row of the paper with our figure beside it.

    Attributes:
        row: the paper's.
        ours: our mean over the same structure; None without data.
        count: cases (objects, where a case is about several labels) in it.
        interval: of our Dice, by drawing those; None for fewer than two.
        task: our task folder.
    """

    row: PaperRow
    ours: Score | None
    count: int = 0
    interval: Interval | None = None
    task: str = ""


def compare(result: EvaluationResult) -> tuple[Comparison, ...]:
    """Every row of the paper, with ours where there is data for it."""
    found: dict[str, list[ObjectResult | CaseResult]] = {}
    for item in _items(result):
        name = _row_name(item)
        if name is not None:
            found.setdefault(name, []).append(item)
    return tuple(_comparison(row, found.get(row.name, []), result) for row in PAPER_ROWS)


def _items(result: EvaluationResult) -> Iterable[ObjectResult | CaseResult]:
    """Cases where each is about one label, else objects."""
    return result.cases if result.settings["protocol"] == "medsam" else result.objects


def _row_name(item: ObjectResult | CaseResult) -> str | None:
    folder = item.task.rpartition("/")[2]
    own = folder.replace("_", " ")
    if any(row.name == own for row in PAPER_ROWS):
        return own
    return OUR_LABELS.get((folder, item.label_name))


def _comparison(
    row: PaperRow, items: list[ObjectResult | CaseResult], result: EvaluationResult
) -> Comparison:
    if not items:
        return Comparison(row, None)
    scores = [item.score for item in items]
    ends = bootstrap_mean([score.dsc for score in scores], result.settings["seed"])
    unit: IntervalUnit = "cases" if isinstance(items[0], CaseResult) else "objects"
    interval = None if ends is None else Interval(*ends, unit=unit, level=LEVEL)
    tasks = sorted({item.task for item in items})
    return Comparison(row, mean_score(scores), len(items), interval, ", ".join(tasks))
