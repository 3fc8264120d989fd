"""Objects added to an earlier result: its label map is read again and written anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..datasets.dicom_seg import read_segments
from ..datasets.labels import ReadLabels, labels_in, read_nifti_labels
from ..images.npz_files import read_label_names, read_labels
from ..images.volumes import Volume, label_dtype
from .dicom_sources import short_text
from .segmentation import Segmentation, SegmentedObject

READABLE = ("npz", "dicom-seg", "nifti")
"""Formats that objects can be added to; those that know names first."""


@dataclass(frozen=True, eq=False, repr=False)
class Earlier:
    """An earlier result on the same image.

    Attributes:
        path: the file.
        labels: (D, H, W).
        objects: in the order of their labels; `object 3` where the file has no name.
    """

    path: Path
    labels: npt.NDArray[np.integer]
    objects: tuple[SegmentedObject, ...]

    def by_name(self) -> dict[str, int]:
        """Name as DICOM shortens it → label."""
        return {short_text(one.name): one.label for one in self.objects}

    def check(self, names: Iterable[str], *, overwrite: bool = False) -> None:
        """Refuse new objects that have the name of one that is there, before any work.

        Raises:
            InputError: one has, and it may not be overwritten.
        """
        there = self.by_name()
        for name in map(short_text, names):
            if name in there and not overwrite:
                raise InputError(
                    f"{self.path} has {name!r} already, label {there[name]}: --overwrite replaces "
                    "it, or give the new object another name"
                )


def read_earlier(image: Volume, paths: Mapping[str, Path]) -> Earlier:
    """The result that lies where `paths` would be written.

    Args:
        image: what is segmented.
        paths: see `outputs.files.planned`.

    Raises:
        InputError: there is none in one of `READABLE`, or it is damaged or of another image.
    """
    for name in READABLE:
        path = paths.get(name)
        if path is None or not path.exists():
            continue
        read = _read(name, path, image)
        labels = sorted({*labels_in(read.values), *read.names} - {0})
        if labels and labels[0] < 0:
            raise InputError(f"{path} holds {labels[0]}: expected labels from 0 on")
        objects = [SegmentedObject(n, read.names.get(n) or f"object {n}") for n in labels]
        return Earlier(path, read.values, tuple(objects))
    wanted = [str(path) for name, path in paths.items() if name in READABLE]
    raise InputError(
        f"nothing to add to: expected {' or '.join(wanted)}"
        if wanted
        else f"objects can be added to {', '.join(READABLE)}: ask for one of these formats, too"
    )


def _read(name: str, path: Path, image: Volume) -> ReadLabels:
    if name == "dicom-seg":
        return read_segments(path, image)
    if name == "nifti":
        return read_nifti_labels(path, image)
    return ReadLabels(read_labels(path, image.shape, "segs"), read_label_names(path))


def merged(earlier: Earlier, new: Segmentation, *, overwrite: bool = False) -> Segmentation:
    """Both on one label map; a new object covers what it shares with earlier ones.

    Args:
        earlier: its objects keep their labels.
        new: its objects get the next free labels, or that of the object which they replace.
        overwrite: replace objects of the same name.

    Raises:
        InputError: see `Earlier.check`; more labels than a label map holds.
    """
    earlier.check([one.name for one in new.objects], overwrite=overwrite)
    there = earlier.by_name()
    last = max((one.label for one in earlier.objects), default=0)
    place = {}
    for one in new.objects:
        if short_text(one.name) not in there:
            last += 1
        place[one.label] = there.get(short_text(one.name), last)
    labels: npt.NDArray[np.unsignedinteger] = earlier.labels.astype(label_dtype(last))
    replaced = [label for label in place.values() if label in there.values()]
    labels[np.isin(labels, replaced)] = 0
    for label, target in place.items():
        labels[new.labels == label] = target
    kept = [one for one in earlier.objects if one.label not in replaced]
    moved = [replace(one, label=place[one.label]) for one in new.objects]
    objects = sorted([*kept, *moved], key=lambda one: one.label)
    confidence = np.full((len(objects), len(labels)), np.nan, np.float32)
    rows = {one.label: row for row, one in enumerate(objects)}
    for one, known in zip(new.objects, new.confidence, strict=True):
        confidence[rows[place[one.label]]] = known
    return replace(
        new, labels=labels, objects=tuple(objects), confidence=confidence, fractions=None
    )
