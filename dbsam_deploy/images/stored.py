"""What a volume's files hold, read a second time: a `Volume` itself keeps 0–255 only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .dicom import is_in_hu, slices_again
from .dicom_files import reading_dicom
from .dicom_frames import DicomSlice
from .dicom_pixels import measured
from .nifti import read_nifti
from .npz_files import read_npz
from .scans import check_shape
from .volumes import Volume

Slices = Iterator[tuple[int, npt.NDArray[np.float32]]]


def stored_values(volume: Volume) -> tuple[str, Slices] | None:
    """The values of a volume's files, slice by slice in any order.

    Of DICOM one file is in memory at a time, of other formats the whole array.

    Returns:
        `HU` or `stored value`, and pairs of a slice and its (H, W) values after the file's own
        rescaling, NaN where a pixel holds no measurement; None for colour, pictures and arrays.

    Raises:
        InputError: a file is gone, or of another shape by now; also while the slices are taken.
    """
    if volume.kind not in ("dicom", "nifti", "npz") or volume.pixels.ndim != 3:
        return None
    if volume.kind == "dicom":
        frames = slices_again(volume.files, volume.path, volume.shape)
        return "HU" if is_in_hu(frames[0]) else "stored value", _dicom(frames, volume.path)
    return "stored value", _array(volume)


def _dicom(frames: tuple[DicomSlice, ...], path: Path) -> Slices:
    slices = measured(frames)
    while True:
        with reading_dicom(path):
            found = next(slices, None)
        if found is None:
            return
        yield found


def _array(volume: Volume) -> Slices:
    if volume.kind == "npz":
        array, padding = read_npz(volume.path, with_boxes=False).values, None
    else:
        scan = read_nifti(volume.path, volume=volume.member)
        array, padding = scan.values, scan.padding
    check_shape(array.shape, volume.shape, volume.path)
    for index, plane in enumerate(array):
        values = plane.astype(np.float32)
        if padding is not None:
            values[padding[index]] = np.nan
        yield index, values
