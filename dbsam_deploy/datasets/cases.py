"""One labelled image of a data set, as it was found and as it is read.

An npz holds its own labels. Of a pair, images and label map are files of their own (NIfTI), or a
DICOM series and a SEG file that refers to it. Labels are never resampled: a map on another grid
than its images is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..images.intensity import Window, window_range
from ..images.nifti import count_volumes
from ..images.npz_files import read_label_names, read_labels
from ..images.volumes import SOFT_TISSUE, SOFT_TISSUE_TEXT, Volume, read_image
from .dicom_seg import read_segments
from .labels import ReadLabels, read_nifti_labels


@dataclass(frozen=True)
class Reading:
    """How images are read, where the data set leaves it open.

    Attributes:
        window: (level, width) that maps stored values to 0–255, see `read_image`.
        modality: number from 0, or name, of one of several images of the same grid.
    """

    window: Window | None = None
    modality: str | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            window_range(self.window)


@dataclass(frozen=True)
class CaseFile:
    """An image with labels that was found.

    Attributes:
        path: the npz or NIfTI file, or the folder of a DICOM series.
        task: the folder it lies in, or the data set that it is part of.
        name: an npz file's path relative to the data folder; of a pair the same without a suffix.
        labels: its label map or SEG file; None for an npz, which has its own.
        label_names: label and name of each object that the data set names.
        ignored: the label of voxels that nobody judged.
        series: SeriesInstanceUID of a DICOM series.
        files: of a pair, all that is read.
        volume: which one of a 4D NIfTI file.
        window: as asked for; None where the format decides.
        is_ct: whether the data set says that values are HU.
    """

    path: Path
    task: str
    name: str
    labels: Path | None = None
    label_names: tuple[tuple[int, str], ...] = ()
    ignored: int | None = None
    series: str = ""
    files: tuple[Path, ...] = ()
    volume: int | None = None
    window: Window | None = None
    is_ct: bool = False


@dataclass(frozen=True)
class LabelledCase:
    """A case that was read.

    Attributes:
        task: see `CaseFile`.
        name: see `CaseFile`.
        volume: (D, H, W) slices with the file's own boxes and spacing, if it has any.
        labels: (D, H, W) whole numbers, 0 outside every object.
        label_names: value → name; may be empty.
        notes: what was made of the files, where that is worth a word.
    """

    task: str
    name: str
    volume: Volume
    labels: npt.NDArray[Any]
    label_names: dict[int, str]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.labels.shape != self.volume.shape:
            raise InputError(
                f"{self.name}: labels of shape {self.labels.shape} for images of shape "
                f"{self.volume.shape}"
            )

    @property
    def file_name(self) -> str:
        """Name as an npz without folders, which seeds the boxes: converted cases have the same."""
        return npz_name(PurePosixPath(self.name).name)

    def present(self, index: int) -> list[int]:
        """Labels on slice `index`, ascending."""
        return [int(label) for label in np.unique(self.labels[index]) if label]


def own_task(folder: Path) -> str:
    """The task of what lies directly in a data folder."""
    return folder.resolve().name or "data"


def npz_name(name: str) -> str:
    """What a case is called as an npz."""
    return name if name.endswith(".npz") else f"{name}.npz"


def read_case(file: CaseFile) -> LabelledCase:
    """Read images and labels.

    Raises:
        InputError: a damaged or pickled file, missing arrays, images that are not finite, labels
            on another grid, of another kind than whole numbers, or without a single object.
        MissingError: the package for its format is not installed.
    """
    volume, found = _read_npz(file) if file.labels is None else _read_pair(file, file.labels)
    where, labels = file.labels or f"{file.path}: gts", found.values
    if file.ignored is not None and (labels == file.ignored).any():
        labels = np.where(labels == file.ignored, np.zeros((), labels.dtype), labels)
        found = found.with_note(f"label {file.ignored}, which is to be ignored, counts as outside")
    if labels.min() < 0:
        raise InputError(f"{where} holds {labels.min()}; expected labels from 0 upwards")
    if not labels.any():
        raise InputError(f"{where} is 0 everywhere; there is no object to evaluate or learn")
    return LabelledCase(file.task, file.name, volume, labels, found.names, found.notes)


def read_cases(files: Sequence[CaseFile]) -> Iterator[LabelledCase]:
    """Read one case after another, so that only one is held in memory."""
    return (read_case(file) for file in files)


def _read_npz(file: CaseFile) -> tuple[Volume, ReadLabels]:
    volume = read_image(file.path)
    labels = read_labels(file.path, volume.shape)
    return volume, ReadLabels(labels, read_label_names(file.path))


def _read_pair(file: CaseFile, labels: Path) -> tuple[Volume, ReadLabels]:
    if file.series:
        volume = read_image(file.path, window=file.window, series=file.series)
        found = read_segments(labels, volume)
        about = tuple(note for note in volume.notes if labels.name not in note)
        return volume, found.with_note(*about)
    if file.volume is None and (count := count_volumes(file.path)) > 1:
        raise InputError(
            f"{file.path} holds {count} images of one grid: choose one with --modality 0 to "
            f"{count - 1} (Python: Reading(modality=...))"
        )
    window, notes = file.window, tuple[str, ...]()
    if file.is_ct and window is None:
        window, notes = SOFT_TISSUE, (SOFT_TISSUE_TEXT,)
    volume = read_image(file.path, window=window, volume=file.volume)
    found = read_nifti_labels(labels, volume).with_note(*notes)
    return volume, found.named(dict(file.label_names), file.ignored, labels)
