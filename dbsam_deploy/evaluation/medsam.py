"""The protocol `medsam`: every slice at 256×256, each label of a file a case of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..core.imaging import ByteArray, FloatArray
from ..core.masks import Prediction
from ..datasets.cases import LabelledCase
from ..extras import require
from .boxes import file_generator, fill_box, grow_box, tight_box
from .metrics import BoolArray, hausdorff_95, volume_error
from .protocols import MEDSAM_MIN_PX, MEDSAM_SIDE
from .results import CaseResult, ObjectResult, Overlay, Skipped, mean_score
from .run import CaseOutcome, Run
from .segmenters import segment_boxes

_SIZE = (MEDSAM_SIDE, MEDSAM_SIDE)


@dataclass
class _Target:
    """One label of a file, filled slice by slice.

    Attributes:
        label: its value.
        boxes: slice → (4,) float32 on the 256 grid.
        truth: slice → (256, 256).
        predictions: the same, for the slices that were segmented.
        filled: the box as a mask, the same.
    """

    label: int
    boxes: dict[int, FloatArray] = field(default_factory=dict)
    truth: dict[int, BoolArray] = field(default_factory=dict)
    predictions: dict[int, BoolArray] = field(default_factory=dict)
    filled: dict[int, BoolArray] = field(default_factory=dict)


def evaluate_volumes(case: LabelledCase, run: Run) -> CaseOutcome:
    """Segment every label of a file on all its slices and score it as a whole.

    Raises:
        InputError: the model refuses an image, or its logits are not finite.
        EngineError: slices of another size without scikit-image.
    """
    targets, skipped = _targets(case, run)
    used = sorted({index for target in targets for index in target.boxes})
    chosen = run.choose(used)
    if len(chosen) < len(used):
        reason = f"slice beyond the limit of {run.max_slices}"
        skipped.append(Skipped(case.task, case.name, reason, len(used) - len(chosen)))
    objects: list[ObjectResult] = []
    for done, index in enumerate(chosen):
        run.progress(done, len(chosen))
        objects += _segment_slice(case, index, [t for t in targets if index in t.boxes], run)
    seen = [target for target in targets if target.predictions]
    cases = tuple(_case_result(case, target, objects, run) for target in seen)
    return CaseOutcome(tuple(objects), cases, tuple(skipped))


def _targets(case: LabelledCase, run: Run) -> tuple[list[_Target], list[Skipped]]:
    """The labels with at least one slice above the limit, all their boxes, and what was dropped.

    All boxes are drawn, also those that a limit leaves out, so that a limit changes no box.
    """
    rng = file_generator(case.file_name, run.protocol.seed)
    targets = {int(label): _Target(int(label)) for label in np.unique(case.labels) if label}
    small = 0
    for index in np.flatnonzero(case.labels.any((1, 2))).tolist():
        plane = resize_labels(case.labels[index])
        for label in case.present(index):
            truth = plane == label
            if truth.sum() <= MEDSAM_MIN_PX:
                small += 1
                continue
            targets[label].truth[index] = truth
    for target in targets.values():
        for index, truth in target.truth.items():
            tight = tight_box(truth, inclusive=True)
            target.boxes[index] = grow_box(tight, _SIZE, run.protocol.growth, rng)
    empty = sum(not target.boxes for target in targets.values())
    notes = {
        f"object of at most {MEDSAM_MIN_PX} px at {MEDSAM_SIDE}×{MEDSAM_SIDE}": small,
        "label left without a slice": empty,
    }
    skipped = [Skipped(case.task, case.name, note, n) for note, n in notes.items() if n]
    return [target for target in targets.values() if target.boxes], skipped


def _segment_slice(
    case: LabelledCase, index: int, targets: list[_Target], run: Run
) -> list[ObjectResult]:
    image = resize_image(case.volume.slice_rgb(index))
    boxes = np.stack([target.boxes[index] for target in targets])
    answer = segment_boxes(run.segmenter, image, boxes)
    found = zip(boxes, cut_logits(answer), answer.ious[:, 0].tolist(), strict=True)
    results = []
    for target, (box, mask, iou) in zip(targets, found, strict=True):
        truth = target.truth[index]
        filled = fill_box(box, _SIZE, inclusive=True)
        target.predictions[index], target.filled[index] = mask, filled
        result = ObjectResult(
            task=case.task,
            file=case.name,
            label=target.label,
            label_name=case.label_names.get(target.label, ""),
            slice_index=index,
            pixels=int(truth.sum()),
            box=tuple(box.tolist()),
            score=run.score(mask, truth, filled),
            predicted_iou=iou,
        )
        results.append(result)
        x0, y0, x1, y1 = box.tolist()
        run.gallery.offer(Overlay(result, index, image, truth, mask, (x0, y0, x1, y1)))
    return results


def cut_logits(prediction: Prediction) -> BoolArray:
    """(N, 256, 256) masks of a 256×256 image: logits above 0 on the mask grid, if it has that side.

    Another model's logits are enlarged or reduced to the image, as `Prediction.masks` are.
    """
    logits = prediction.known_logits()[:, 0]
    same = logits.shape[1:] == _SIZE
    return np.asarray(logits > 0 if same else prediction.masks[:, 0] != 0)


def _case_result(
    case: LabelledCase, target: _Target, objects: list[ObjectResult], run: Run
) -> CaseResult:
    indices = sorted(target.predictions)
    prediction, truth, filled = (
        np.stack([masks[index] for index in indices])
        for masks in (target.predictions, target.truth, target.filled)
    )
    spacing = _spacing(case) if run.protocol.millimetres else None
    score = run.score(prediction, truth, filled, spacing)
    if run.with_nsd:
        score = replace(
            score,
            hd95=hausdorff_95(prediction, truth, spacing),
            volume_error=volume_error(prediction, truth),
        )
    own = [item for item in objects if item.label == target.label]
    dimensions: Literal["2D", "3D"] = "3D" if is_volume(case) else "2D"
    if dimensions == "2D":
        images = mean_score(item.score for item in own)
        score = replace(score, dsc=images.dsc, box_dsc=images.box_dsc)
    name = case.label_names.get(target.label, "")
    return CaseResult(
        task=case.task,
        name=f"{case.name}:{name or target.label}",
        file=case.name,
        label_name=name,
        dimensions=dimensions,
        slices=len(indices),
        objects=len(own),
        tolerance=f"{run.protocol.tolerance:g} {'voxel' if spacing is None else 'mm'}",
        score=score,
    )


def is_volume(case: LabelledCase) -> bool:
    """Whether a stack counts as a volume: as in the official code, unless the task says `2D`."""
    return case.volume.is_volume and "2D" not in case.task


def _spacing(case: LabelledCase) -> tuple[float, float, float] | None:
    """Distance between voxels of the 256 grid along (z, y, x) in mm."""
    if case.volume.spacing_mm is None:
        return None
    z, y, x = case.volume.spacing_mm
    return z, y * case.volume.shape[1] / MEDSAM_SIDE, x * case.volume.shape[2] / MEDSAM_SIDE


def resize_image(image: ByteArray) -> ByteArray:
    """(H, W, 3) → (256, 256, 3) uint8 with scikit-image's order 3; unchanged if it has that size.

    Raises:
        EngineError: scikit-image is not installed.
    """
    if image.shape[:2] == _SIZE:
        return image
    out = _resize(image, order=3, anti_aliasing=True)
    return np.asarray(np.clip(out, 0, 255).astype(np.uint8))


def resize_labels(labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(H, W) → (256, 256) by the nearest pixel; unchanged if it has that size.

    Raises:
        EngineError: scikit-image is not installed.
    """
    if labels.shape == _SIZE:
        return labels
    values = _resize(labels.astype(np.float64), order=0, anti_aliasing=False)
    return np.asarray(np.rint(values).astype(np.int64))


def _resize(pixels: npt.NDArray[Any], *, order: int, anti_aliasing: bool) -> npt.NDArray[Any]:
    transform = require("skimage.transform", extra="eval", what_for="the protocol medsam")
    return np.asarray(
        transform.resize(
            pixels,
            (*_SIZE, *pixels.shape[2:]),
            order=order,
            preserve_range=True,
            mode="constant",
            anti_aliasing=anti_aliasing,
        )
    )
