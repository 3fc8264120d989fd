"""New objects beside those of a label map that is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import FloatArray
from ..files.damage import DAMAGED, reason_of
from ..images.scans import require_nibabel
from ..images.volumes import Volume, label_dtype
from .files import OVERLAY
from .segmentation import Segmentation, SegmentedObject


def earlier(image: Volume, paths: Mapping[str, Path]) -> Segmentation | None:
    """The segmentation of `image` that was written before, as far as its files tell.

    Args:
        image: what was segmented then, too.
        paths: format → path, see `files.planned`. An npz has the objects' names, NIfTI has not.

    Raises:
        InputError: the files that are there hold no label map, or one of another image.
    """
    there = [name for name, path in paths.items() if path.exists() and name != OVERLAY]
    name = next((name for name in ("npz", "nifti") if name in there), None)
    if name is None and there:
        raise InputError(f"{paths[there[0]]} cannot be added to: --merge goes with npz and NIfTI")
    if name is None:
        return None
    try:
        found = _of_npz(paths[name], image) if name == "npz" else _of_nifti(paths[name], image)
    except DAMAGED as error:
        raise InputError(f"{paths[name]} is no label map: {reason_of(error)}") from error
    if found is None:
        raise InputError(f"{paths[name]} is of another image: choose another --output folder")
    return found


def _of_npz(path: Path, image: Volume) -> Segmentation | None:
    with np.load(path, allow_pickle=False) as content:
        labels, confidence = content["segs"], content["confidence"]
        named = zip(content["label_ids"].tolist(), content["label_names"].tolist(), strict=True)
    return _segmentation(image, labels, [SegmentedObject(*one) for one in named], confidence)


def _of_nifti(path: Path, image: Volume) -> Segmentation | None:
    file = require_nibabel().load(path)
    affine = None if image.geometry is None else image.geometry.affine
    if affine is None or not np.allclose(file.affine, affine, atol=1e-3):
        return None
    labels = np.asarray(file.dataobj).reshape(image.shape[::-1]).transpose(2, 1, 0)
    objects = [SegmentedObject(n, f"label {n}") for n in np.unique(labels[labels > 0]).tolist()]
    unknown = np.full((len(objects), len(labels)), np.nan, np.float32)
    return _segmentation(image, labels, objects, unknown)


def _segmentation(
    image: Volume,
    labels: npt.NDArray[np.unsignedinteger],
    objects: list[SegmentedObject],
    confidence: FloatArray,
) -> Segmentation | None:
    """None where it is of another image."""
    if labels.shape != image.shape or confidence.shape != (len(objects), len(labels)):
        return None
    return Segmentation(image, labels, tuple(objects), confidence, "")


def merged(old: Segmentation, new: Segmentation) -> Segmentation:
    """Both: a new object replaces an old one of its name, takes a free label, and covers others."""
    names = {one.name for one in new.objects}
    kept = [(row, one) for row, one in enumerate(old.objects) if one.name not in names]
    shift = max((one.label for one in old.objects), default=0)
    labels = np.zeros(new.labels.shape, label_dtype(shift + max(o.label for o in new.objects)))
    for _, one in kept:
        labels[old.labels == one.label] = one.label
    inside = new.labels > 0
    labels[inside] = new.labels[inside].astype(labels.dtype) + labels.dtype.type(shift)
    shifted = [dataclasses.replace(one, label=one.label + shift) for one in new.objects]
    return dataclasses.replace(
        new,
        labels=labels,
        objects=(*(one for _, one in kept), *shifted),
        confidence=np.concatenate([old.confidence[[row for row, _ in kept]], new.confidence]),
        fractions=None,
    )
