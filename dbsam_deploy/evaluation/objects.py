"""The protocol `objects`: each label of each slice on its own, in the image frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.imaging import FloatArray
from ..datasets.cases import LabelledCase
from .boxes import file_generator, fill_box, grow_box, tight_box
from .metrics import BoolArray
from .protocols import EvaluationProtocol
from .results import CaseResult, ObjectResult, Overlay, Skipped, mean_score
from .run import CaseOutcome, Run, as_bool
from .segmenters import segment_boxes


@dataclass(frozen=True)
class _SliceObjects:
    """The objects of one slice that are large enough, and their boxes (N, 4)."""

    index: int
    labels: tuple[int, ...]
    boxes: FloatArray


def evaluate_objects(case: LabelledCase, run: Run) -> CaseOutcome:
    """Segment every object of a file and score it.

    Raises:
        InputError: the model refuses an image, or its logits are not finite.
    """
    plan, small = _plan(case, run.protocol)
    chosen = set(run.choose([item.index for item in plan]))
    skipped = []
    if small:
        reason = f"object under {run.protocol.min_object_px} px"
        skipped.append(Skipped(case.task, case.name, reason, small))
    left_out = sum(len(item.labels) for item in plan if item.index not in chosen)
    if left_out:
        reason = f"object on a slice beyond the limit of {run.max_slices}"
        skipped.append(Skipped(case.task, case.name, reason, left_out))
    results: list[ObjectResult] = []
    for done, item in enumerate(item for item in plan if item.index in chosen):
        run.progress(done, len(chosen))
        results += _evaluate_slice(case, item, run)
    if not results:
        return CaseOutcome((), (), tuple(skipped))
    outcome = CaseResult(
        task=case.task,
        name=case.name,
        file=case.name,
        label_name="",
        dimensions="3D" if case.volume.is_volume else "2D",
        slices=len(chosen),
        objects=len(results),
        tolerance=f"{run.protocol.tolerance:g} px",
        score=mean_score(result.score for result in results),
    )
    return CaseOutcome(tuple(results), (outcome,), tuple(skipped))


def _plan(case: LabelledCase, protocol: EvaluationProtocol) -> tuple[list[_SliceObjects], int]:
    """Objects and boxes of all slices, and how many objects are too small.

    All boxes are drawn, also those that a limit leaves out, so that a limit changes no box.
    """
    rng = file_generator(case.file_name, protocol.seed)
    size = case.volume.shape[1:]
    plan, small = [], 0
    for index, labels in enumerate(case.labels):
        ids, counts = np.unique(labels[labels != 0], return_counts=True)
        large = [int(i) for i, n in zip(ids, counts, strict=True) if n >= protocol.min_object_px]
        small += len(ids) - len(large)
        boxes = [
            grow_box(tight_box(labels == label, inclusive=False), size, protocol.growth, rng)
            for label in large
        ]
        if boxes:
            plan.append(_SliceObjects(index, tuple(large), np.stack(boxes)))
    return plan, small


def _evaluate_slice(case: LabelledCase, item: _SliceObjects, run: Run) -> list[ObjectResult]:
    image = case.volume.slice_rgb(item.index)
    answer = segment_boxes(run.segmenter, image, item.boxes)
    found = zip(item.boxes, as_bool(answer.masks[:, 0]), answer.ious[:, 0].tolist(), strict=True)
    results = []
    for label, (box, mask, iou) in zip(item.labels, found, strict=True):
        truth: BoolArray = case.labels[item.index] == label
        filled = fill_box(box, truth.shape, inclusive=False)
        result = ObjectResult(
            task=case.task,
            file=case.name,
            label=label,
            label_name=case.label_names.get(label, ""),
            slice_index=item.index,
            pixels=int(truth.sum()),
            box=tuple(box.tolist()),
            score=run.score(mask, truth, filled),
            predicted_iou=iou,
        )
        results.append(result)
        overlay = Overlay(result, item.index, image, truth, mask, tuple(box.tolist()))
        run.gallery.offer(overlay)
    return results
