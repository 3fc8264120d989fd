"""The protocol `cvpr24`: boxes of the challenge, one label map, each label scored on it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import FloatArray
from ..datasets.cases import LabelledCase
from ..images.volumes import label_dtype
from .boxes import file_generator, fill_box, grow_box, tight_box
from .metrics import BoolArray
from .propagation import Box3D, LabelVolume, propagate
from .protocols import CHALLENGE_MIN_DSC
from .results import CaseResult, ObjectResult, Overlay, Score, Skipped, mean_score
from .run import CaseOutcome, Run, as_bool
from .segmenters import segment_boxes


@dataclass(frozen=True)
class _Scored:
    """Arrays of one label: all (H, W), or all (D, H, W) of a volume."""

    prediction: BoolArray
    truth: BoolArray
    box: BoolArray


def evaluate_labels(case: LabelledCase, run: Run) -> CaseOutcome:
    """Segment a file with the challenge's boxes and score every label.

    Raises:
        InputError: fewer boxes in the file than labels, 3D boxes for an image or 2D ones for a
            stack, or the model refuses an image.
    """
    if case.volume.is_volume and case.volume.spacing_mm is not None:
        return _evaluate_volume(case, run)
    indices = [z for z in range(len(case.labels)) if case.present(z)]
    chosen = run.choose(indices)
    skipped = []
    if len(chosen) < len(indices):
        reason = f"slice beyond the limit of {run.max_slices}"
        skipped.append(Skipped(case.task, case.name, reason, len(indices) - len(chosen)))
    boxes = _image_boxes(case, indices, run)
    objects: list[ObjectResult] = []
    cases = []
    for done, index in enumerate(chosen):
        run.progress(done, len(chosen))
        found = _evaluate_image(case, index, boxes[index], run)
        objects += found
        name = f"{case.name}[{index}]" if case.volume.is_volume else case.name
        cases.append(case_result(case, name, found, 1, run))
    return CaseOutcome(tuple(objects), tuple(cases), tuple(skipped))


def _own_boxes(case: LabelledCase) -> FloatArray | None:
    """The file's boxes, box i for label i, if there are any."""
    boxes = case.volume.boxes
    if boxes is None:
        return None
    if boxes.shape[1] == 6 and case.volume.spacing_mm is None:
        raise InputError(f"{case.volume.path}: 3D boxes, but no spacing; expected (z, y, x) in mm")
    if case.volume.is_volume and boxes.shape[1] == 4:
        raise InputError(
            f"{case.volume.path}: boxes (n, 4) for {case.volume.shape[0]} slices; expected (n, 6)"
        )
    top = int(case.labels.max())
    if top > len(boxes):
        raise InputError(
            f"{case.volume.path}: {len(boxes)} boxes, but gts has label {top}; expected box i for "
            "label i, counted from 1"
        )
    return boxes


def _image_boxes(
    case: LabelledCase, indices: list[int], run: Run
) -> dict[int, dict[int, FloatArray]]:
    """Slice → label → box, in the image frame."""
    size, own = case.volume.shape[1:], _own_boxes(case)
    if own is not None:
        return {z: {label: own[label - 1] for label in case.present(z)} for z in indices}
    rng = file_generator(case.file_name, run.protocol.seed)
    return {
        z: {
            label: grow_box(
                tight_box(case.labels[z] == label, inclusive=True), size, run.protocol.growth, rng
            )
            for label in case.present(z)
        }
        for z in indices
    }


def _evaluate_image(
    case: LabelledCase, index: int, boxes: dict[int, FloatArray], run: Run
) -> list[ObjectResult]:
    image, labels = case.volume.slice_rgb(index), list(boxes)
    masks = as_bool(segment_boxes(run.segmenter, image, np.stack(list(boxes.values()))).masks[:, 0])
    found: LabelVolume = np.zeros(image.shape[:2], label_dtype(max(labels)))
    for label, mask in zip(labels, masks, strict=True):
        found[mask] = label
    results = []
    for label, box in boxes.items():
        truth: BoolArray = case.labels[index] == label
        filled = fill_box(box, case.volume.shape[1:], inclusive=True)
        scored = _Scored(np.asarray(found == label), truth, filled)
        result = _object(case, label, index, box, scored, run)
        results.append(result)
        x0, y0, x1, y1 = box.tolist()
        run.gallery.offer(Overlay(result, index, image, truth, scored.prediction, (x0, y0, x1, y1)))
    return results


def _object(
    case: LabelledCase,
    label: int,
    index: int | None,
    box: npt.NDArray[np.floating],
    scored: _Scored,
    run: Run,
) -> ObjectResult:
    spacing = case.volume.spacing_mm if index is None else None
    arrays = (scored.prediction, scored.truth, scored.box)
    if index is not None:  # as coded: a slab one pixel thick
        arrays = (scored.prediction[..., None], scored.truth[..., None], scored.box[..., None])
    score = run.score(*arrays, spacing=spacing)
    return ObjectResult(
        task=case.task,
        file=case.name,
        label=label,
        label_name=case.label_names.get(label, ""),
        slice_index=index,
        pixels=int(scored.truth.sum()),
        box=tuple(box.tolist()),
        score=_cut_nsd(score),
    )


def _cut_nsd(score: Score) -> Score:
    """NSD counts as 0 where Dice is at most 0.2."""
    if score.nsd is not None and score.dsc <= CHALLENGE_MIN_DSC:
        score = replace(score, nsd=0.0)
    if score.box_nsd is not None and score.box_dsc <= CHALLENGE_MIN_DSC:
        score = replace(score, box_nsd=0.0)
    return score


def case_result(
    case: LabelledCase, name: str, objects: list[ObjectResult], slices: int, run: Run
) -> CaseResult:
    """The mean over a case's labels."""
    volume = objects[0].slice_index is None
    return CaseResult(
        task=case.task,
        name=name,
        file=case.name,
        label_name=objects[0].label_name if len(objects) == 1 else "",
        dimensions="3D" if volume else "2D",
        slices=slices,
        objects=len(objects),
        tolerance=f"{run.protocol.tolerance:g} {'mm' if volume else 'px'}",
        score=mean_score(item.score for item in objects),
    )


def _evaluate_volume(case: LabelledCase, run: Run) -> CaseOutcome:
    boxes = volume_boxes(case, run)
    case, boxes, skipped = cropped(case, boxes, run)
    if not boxes:
        return CaseOutcome((), (), tuple(skipped))
    found, visited = propagate(case.volume, boxes, run.segmenter, run.progress)
    results = [
        volume_object(case, label, box, np.asarray(found == label), run)
        for label, box in boxes.items()
    ]
    outcome = case_result(case, case.name, results, visited, run)
    return CaseOutcome(tuple(results), (outcome,), tuple(skipped))


def volume_object(
    case: LabelledCase, label: int, box: Box3D, found: BoolArray, run: Run
) -> ObjectResult:
    """Score a label of a volume and its filled 3D box, and offer its worst slice as a picture.

    Args:
        case: the volume.
        label: which.
        box: its 3D box.
        found: (D, H, W) its mask.
        run: takes the picture.
    """
    truth: BoolArray = case.labels == label
    filled = np.zeros(truth.shape, bool)
    filled[box.z0 : box.z1] = fill_box(box.xyxy, case.volume.shape[1:], inclusive=True)
    result = _object(case, label, None, box.as_array(), _Scored(found, truth, filled), run)
    wrong = (found != truth).sum((1, 2))
    worst = int(wrong.argmax()) if wrong.any() else (box.z0 + box.z1) // 2
    image, (x0, y0, x1, y1) = case.volume.slice_rgb(worst), box.xyxy.tolist()
    run.gallery.offer(Overlay(result, worst, image, truth[worst], found[worst], (x0, y0, x1, y1)))
    return result


def volume_boxes(case: LabelledCase, run: Run) -> dict[int, Box3D]:
    """Label → 3D box, of the labels that occur.

    Raises:
        InputError: fewer boxes in the file than labels, 2D ones, or one that is outside the volume
            or empty.
    """
    labels = [int(label) for label in np.unique(case.labels) if label]
    own, size = _own_boxes(case), case.volume.shape[1:]
    if own is not None:
        depth = case.volume.shape[0]
        return {label: Box3D.from_array(own[label - 1], depth) for label in labels}
    rng = file_generator(case.file_name, run.protocol.seed)
    boxes = {}
    for label in labels:
        mask = case.labels == label
        slices = np.flatnonzero(mask.any((1, 2)))
        flat = tight_box(mask.any(0), inclusive=True)
        xyxy = grow_box(flat, size, run.protocol.growth, rng)
        boxes[label] = Box3D(xyxy, int(slices[0]), int(slices[-1]) + 1)
    return boxes


def cropped(
    case: LabelledCase, boxes: dict[int, Box3D], run: Run
) -> tuple[LabelledCase, dict[int, Box3D], list[Skipped]]:
    """With a limit: the middle slices of the labelled part only, as if the file had no others."""
    first, end = min(b.z0 for b in boxes.values()), max(b.z1 for b in boxes.values())
    limit = run.max_slices
    if limit is None or end - first <= limit:
        return case, boxes, []
    start = first + (end - first - limit) // 2
    part = slice(start, start + limit)
    volume = replace(case.volume, pixels=case.volume.pixels[part])
    cut = replace(case, volume=volume, labels=case.labels[part])
    kept = {
        label: replace(box, z0=max(box.z0 - start, 0), z1=min(box.z1 - start, limit))
        for label, box in boxes.items()
        if (cut.labels == label).any()
    }
    reason = f"slice beyond the limit of {limit}"
    skipped = [Skipped(case.task, case.name, reason, end - first - limit)]
    if len(kept) < len(boxes):
        reason = f"label only on slices beyond the limit of {limit}"
        skipped.append(Skipped(case.task, case.name, reason, len(boxes) - len(kept)))
    return cut, kept, skipped
