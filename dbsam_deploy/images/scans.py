"""NIfTI files as slices with their place in the patient, and label maps back.

Axis convention: a NIfTI array is indexed (x, y, z). Slices are taken along z, and within a slice x
is the array's first axis and y its second, whatever anatomical directions the affine gives them.
So a box (x0, y0, x1, y1) is `array[x0:x1, y0:y1, z]`, and nothing is reoriented or resampled on the
way in or out. In memory slices are (D, H, W) = (z, y, x).
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.contract import MAX_IMAGE_PIXELS
from ..core.errors import InputError
from ..extras import require

MAX_VOXELS = 512 * 1024 * 1024
"""Largest volume that is read (512 Mi voxels: 2 GiB as float32)."""
MAX_VOLUME_BYTES = 2 * 1024 * 1024 * 1024
"""Largest volume in bytes, after it is decompressed."""


@dataclass(frozen=True)
class ScanGeometry:
    """Where voxels lie in the patient.

    Attributes:
        affine: (4, 4) float64, voxel (x, y, z) → millimetres right, anterior, superior.
        shape: shape of a stored NIfTI array, (x, y, z) and possibly trailing 1s.
        header: the NIfTI header masks are written with; None for a DICOM series.
    """

    affine: npt.NDArray[np.float64]
    shape: tuple[int, ...]
    header: Any = None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where pixels come from: their place in the patient, and their files.

    Attributes:
        spacing_mm: distance between voxels along (z, y, x), where the file says so.
        geometry: what a NIfTI label map needs; None where the file does not place its pixels (a
            photograph or X-ray in DICOM), or they form no grid.
        files: every file that was read; none of them may be overwritten.
        unplaced: why the slices of a series form no grid, which NIfTI needs; the predicate of a
            sentence, and empty where they do.
        notes: what was left out, and what was made of the stored numbers and their geometry.
    """

    spacing_mm: tuple[float, float, float] | None = None
    geometry: ScanGeometry | None = None
    files: tuple[Path, ...] = ()
    unplaced: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, other: Provenance) -> dict[str, Any]:
        """What `other` hands on to what is made of it."""
        return {field.name: getattr(other, field.name) for field in fields(cls)}


@dataclass(frozen=True)
class Scan(Provenance):
    """One scan as stored.

    Attributes:
        values: (D, H, W) intensities after the file's own rescaling, or (1, H, W, 3) uint8 RGB.
        padding: (D, H, W) bool, pixels that hold no measurement; None where there are none.
        is_inverted: whether the lowest value is shown white (MONOCHROME1).
        is_ct: whether `values` are HU.
        own_window: in words, the file's own window that `values` went through, so that 0–255 is
            black to white; empty where they did not.
    """

    values: npt.NDArray[Any]
    padding: npt.NDArray[np.bool_] | None = None
    is_inverted: bool = False
    is_ct: bool = False
    own_window: str = ""


def check_voxels(shape: tuple[int, ...], path: Path, voxel_bytes: int = 1) -> None:
    """Refuse a (D, H, W) that is empty or too large before it is read.

    Args:
        shape: D, H, W.
        path: named in errors.
        voxel_bytes: what one takes in memory.

    Raises:
        InputError: a side of 0, a slice above `MAX_IMAGE_PIXELS`, a volume above `MAX_VOXELS` or
            `MAX_VOLUME_BYTES`.
    """
    count, height, width = (int(side) for side in shape)
    if min(count, height, width) < 1:
        raise InputError(f"{path}: array of {count}×{height}×{width} holds no voxel")
    if height * width > MAX_IMAGE_PIXELS or count * height * width > MAX_VOXELS:
        raise InputError(
            f"{path}: {count} slices of {height}×{width} pixels; at most {MAX_IMAGE_PIXELS} pixels "
            f"in a slice and {MAX_VOXELS} voxels in all are read; crop or downsample it"
        )
    if count * height * width * voxel_bytes > MAX_VOLUME_BYTES:
        raise InputError(
            f"{path}: {count}×{height}×{width} voxels of {voxel_bytes} bytes; at most "
            f"{MAX_VOLUME_BYTES} bytes are read; store it in a narrower type, crop or downsample it"
        )


def check_shape(now: tuple[int, ...], before: tuple[int, ...], path: Path) -> None:
    """Refuse files that were read before and have another shape by now.

    Raises:
        InputError: they have.
    """
    if now != before:
        raise InputError(f"{path}: {now} voxels (z, y, x) by now, {before} when it was read first")


def check_channels_last(shape: tuple[int, ...], what: str, slices: str) -> None:
    """Refuse (3, H, W), which is an image with its channels first as often as three slices.

    Args:
        shape: three sides.
        what: what has it, for the message.
        slices: how three slices are given, for the message.

    Raises:
        InputError: three planes, and no channels at the end.
    """
    if shape[0] == 3 and shape[2] not in (1, 3, 4):
        raise InputError(
            f"{what} of shape {tuple(shape)} may be one image with its channels first or three "
            f"slices: give an image as (H, W, 3), {slices}"
        )


def require_nibabel() -> ModuleType:
    """The package nibabel.

    Raises:
        MissingError: it is not installed.
    """
    return require("nibabel", extra="nifti", what_for="a NIfTI file")


_PLACE = ("dim", "dim_info", "pixdim", "xyzt_units", "qform_code", "sform_code")
_PLACE_STARTS = ("quatern_", "qoffset_", "srow_")


def _place_of(header: Any) -> Any:
    """A header that only says where the voxels lie: free text and extensions may name the patient.

    They are not copied and then emptied: what is not listed here does not come along.
    """
    place = type(header)()
    for name in list(header):
        if name in _PLACE or name.startswith(_PLACE_STARTS):
            place[name] = header[name]
    return place


def nifti_bytes(
    labels: npt.NDArray[Any], geometry: ScanGeometry, *, compressed: bool = True
) -> bytes:
    """A label map as the content of a `.nii.gz` or `.nii` file with the input's geometry.

    Args:
        labels: (D, H, W) uint8 or uint16.
        geometry: the input's; affine, shape, units and orientation codes are kept as they are.
        compressed: `.nii.gz`, else `.nii`.

    Raises:
        EngineError: nibabel is not installed.
    """
    nibabel = require_nibabel()
    array = np.ascontiguousarray(labels.transpose(2, 1, 0)).reshape(geometry.shape)
    header = geometry.header
    kind = nibabel.Nifti1Image
    if header is not None:
        header = _place_of(header)
        header.set_data_dtype(array.dtype)
        kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else kind
    image = kind(array, geometry.affine, header)
    if header is None:
        image.header.set_xyzt_units("mm")
        image.set_sform(geometry.affine, code="scanner")
    if not compressed:
        return bytes(image.to_bytes())
    # mtime 0: the same labels give the same file
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)
