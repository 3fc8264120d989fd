"""The protocol `one-prompt`: one box on the slice with most of an object, carried to the others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..core.imaging import FloatArray
from ..core.masks import Prediction
from ..datasets.cases import LabelledCase
from ..images.volumes import Volume
from ..volumes.chain import propagate
from ..volumes.links import Anchor
from ..volumes.stop_rules import RULE
from . import propagation
from .boxes import file_generator, grow_box, tight_box
from .cvpr24 import case_result, cropped, volume_boxes, volume_object
from .metrics import BoolArray, dice
from .results import Skipped
from .run import CaseOutcome, Run, as_bool
from .segmenters import BoxSegmenter, segment_boxes

Masks = dict[int, BoolArray]
"""Label → (D, H, W)."""
SliceBoxes = dict[int, dict[int, FloatArray]]
"""Slice → label → (4,) box in the image frame."""


@dataclass(frozen=True)
class BoxedSlices:
    """A volume and a model as a `SliceDecoder`."""

    volume: Volume
    segmenter: BoxSegmenter

    def decode(self, index: int, boxes: FloatArray) -> Prediction:
        """Masks of slice `index`, one a box."""
        return segment_boxes(self.segmenter, self.volume.slice_rgb(index), boxes)


def evaluate_one_prompt(case: LabelledCase, run: Run) -> CaseOutcome:
    """Prompt each object of a volume once, and score what is made of it.

    Beside it stand the filled 3D box, a box on each of the object's slices (`oracle_dsc`), and the
    propagation of `cvpr24`, which is told the object's extent (`cvpr24_dsc`).

    Raises:
        InputError: boxes of the file that do not fit, or the model refuses an image.
    """
    if not case.volume.is_volume or case.volume.spacing_mm is None:
        reason = "file without slices that follow each other at a known distance"
        return CaseOutcome((), (), (Skipped(case.task, case.name, reason, 1),))
    case, boxes_3d, skipped = cropped(case, volume_boxes(case, run), run)
    if not boxes_3d:
        return CaseOutcome((), (), tuple(skipped))
    boxes = _slice_boxes(case, run)
    slices = BoxedSlices(case.volume, run.segmenter)
    oracle, anchors = _prompted(case, boxes, slices, run)
    found = _carried(case, anchors, slices)
    challenge, _ = propagation.propagate(case.volume, boxes_3d, run.segmenter, run.progress)
    results = []
    for label, box in boxes_3d.items():
        truth: BoolArray = case.labels == label
        item = volume_object(case, label, box, found[label], run)
        beside = replace(
            item.score,
            oracle_dsc=dice(oracle[label], truth),
            cvpr24_dsc=dice(challenge == label, truth),
        )
        results.append(replace(item, score=beside))
    outcome = case_result(case, case.name, results, len(case.labels), run)
    return CaseOutcome(tuple(results), (outcome,), tuple(skipped))


def _slice_boxes(case: LabelledCase, run: Run) -> SliceBoxes:
    rng, size = file_generator(case.file_name, run.protocol.seed), case.volume.shape[1:]

    def box(mask: BoolArray) -> FloatArray:
        return grow_box(tight_box(mask, inclusive=False), size, run.protocol.growth, rng)

    return {
        index: {label: box(labels == label) for label in case.present(index)}
        for index, labels in enumerate(case.labels)
        if labels.any()
    }


def _prompted(
    case: LabelledCase, boxes: SliceBoxes, slices: BoxedSlices, run: Run
) -> tuple[Masks, list[Anchor]]:
    """What a box on every slice gives, and of that each label's slice with most of the object."""
    masks: Masks = {}
    anchors = {}
    largest = {
        int(label): int((case.labels == label).sum((1, 2)).argmax())
        for label in np.unique(case.labels)
        if label
    }
    for done, (index, own) in enumerate(boxes.items()):
        run.progress(done, len(boxes))
        answer = slices.decode(index, np.stack(list(own.values())))
        found = zip(own.items(), as_bool(answer.masks[:, 0]), answer.ious, strict=True)
        for (label, box), mask, iou in found:
            masks.setdefault(label, np.zeros(case.labels.shape, bool))[index] = mask
            if largest[label] == index and mask.any():
                anchors[label] = Anchor(label, index, mask, float(iou[0]), prompt=box)
    return masks, list(anchors.values())


def _carried(case: LabelledCase, anchors: list[Anchor], slices: BoxedSlices) -> Masks:
    """What one box of each label gives; nothing where the model finds nothing in it."""
    labels = [int(label) for label in np.unique(case.labels) if label]
    masks = {label: np.zeros(case.labels.shape, bool) for label in labels}
    for anchor in anchors:
        masks[anchor.label][anchor.index] = anchor.mask
    carried = propagate(
        slices,
        anchors,
        len(case.labels),
        RULE,
        spacing_mm=case.volume.spacing_mm,
        intensities=lambda index: case.volume.pixels[index],
    )
    for found in carried:
        masks[found.label][found.index] = found.mask
    return masks
