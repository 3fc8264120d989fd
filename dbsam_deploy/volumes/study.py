"""Prompts on a volume → named objects: what `predict`, `batch` and a PACS call."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..core.errors import InputError
from ..images.volumes import Volume, label_dtype
from ..outputs.segmentation import Segmentation
from ..prediction.predictor import Promptable
from ..prediction.prompts import Prompts, check_prompts
from ..prediction.segment import Progress, segment
from .study_prompts import ObjectPrompts, StudyPrompts


def _silent(done: int, total: int) -> None:
    """Default `Progress`: says nothing."""


def check_study(spec: StudyPrompts, volume: Volume) -> StudyPrompts:
    """`spec` in voxels of `volume`, if all of it fits; nothing is computed yet.

    Raises:
        InputError: no object, or a prompt outside the volume, with the object's name.
    """
    if not spec.objects:
        raise InputError(f"no object to look for in {volume.path}: give one at least")
    if spec.space != "voxel":
        raise InputError(f"coordinates in {spec.space}: expected voxels")
    for one in spec.objects:
        try:
            for prompts in _flat(one):
                check_prompts(prompts, volume)
        except InputError as error:
            raise InputError(f"{one.name}: {error.message}") from error
    return spec


def segment_study(
    predictor: Promptable,
    volume: Volume,
    spec: StudyPrompts,
    *,
    model: str,
    note: str = "",
    progress: Progress = _silent,
    checkpoint: Path | None = None,
) -> Segmentation:
    """Segment the objects that `spec` names in one volume.

    Args:
        predictor: a model, in this process or behind a server.
        volume: image or volume.
        spec: the same for every study, or for this one; see `check_study`, which is applied here.
        model: name of the model, in words, for the result.
        note: what the user must know of it, for the result.
        progress: called with slices done and slices in all.
        checkpoint: folder that keeps finished slices until the result is there; another run with
            the same image, prompts and model goes on from them. None keeps nothing.

    Raises:
        InputError: see `check_study`; a checkpoint of another image, prompts or model.
        ServingError: a server that does not answer.
    """
    spec = check_study(spec, volume)
    labels = np.zeros(volume.shape, label_dtype(len(spec.objects)))
    confidence = np.full((len(spec.objects), volume.shape[0]), np.nan, np.float32)
    for row, one in enumerate(spec.objects):
        for prompts in _flat(one):
            part = segment(predictor, volume, prompts, progress)
            found = Segmentation.from_result(part, model)
            labels[part.labels > 0] = row + 1
            decoded = np.isfinite(found.confidence[0])
            confidence[row, decoded] = found.confidence[0, decoded]
    return Segmentation(volume, labels, spec.segmented, confidence, model, note=note)


def _flat(one: ObjectPrompts) -> list[Prompts]:
    if one.box_3d is not None:
        return [Prompts(boxes_3d=np.array([one.box_3d]))]
    found = []
    for prompt in one.prompts:
        points = np.array(prompt.points) if prompt.points else None
        found.append(
            Prompts(
                boxes=None if prompt.box is None else np.array([prompt.box]),
                point_coords=None if points is None else points[None, :, :-1],
                point_labels=None if points is None else points[None, :, -1].astype(np.int64),
                slice_index=prompt.index,
            )
        )
    return found
