"""Voxels and patient millimetres, and which array axis an anatomical plane cuts.

Voxel coordinates are (x, y, z) along W, H and D of a volume's pixels, from the first voxel's corner
as in SAM: voxel (i, j, k) fills i to i + 1, j to j + 1, k to k + 1, and its centre, where a file's
affine maps its index, is (i + 0.5, j + 0.5, k + 0.5).
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..images.arrays import as_array
from ..images.volumes import Volume, no_grid

Space = Literal["voxel", "lps", "ras"]
"""Voxels, or millimetres: towards left, posterior, superior as in DICOM, or right, anterior,
superior as in NIfTI."""
Plane = Literal["stored", "axial", "coronal", "sagittal"]
"""The slices as they are stored, or anatomical ones, see `plane_axis`."""

_FLIPS = {"ras": (1.0, 1.0, 1.0, 1.0), "lps": (-1.0, -1.0, 1.0, 1.0)}
_NORMALS = ("sagittal", "coronal", "axial")
"""The plane across each of the patient's axes: left–right, front–back, foot–head."""
_DIGITS = 6
"""Of a voxel coordinate: what an affine's inverse adds behind them is rounding."""
_ON_THE_BORDER = 0.01
"""Voxels that a coordinate in mm may lie outside: viewers round to a few digits."""


def _corner_affine(volume: Volume, space: str) -> npt.NDArray[np.float64]:
    """(4, 4), voxel coordinates of this module → mm.

    Raises:
        InputError: another space, or a volume without a place in the patient.
    """
    if space not in _FLIPS:
        raise InputError(f"space {space!r}: expected voxel, lps or ras")
    if volume.geometry is None:
        raise InputError(
            f"{volume.path}: {no_grid(volume)}, so millimetres mean nothing: give voxels"
        )
    to_centre = np.eye(4)
    to_centre[:3, 3] = -0.5
    return np.asarray(np.diag(_FLIPS[space]) @ volume.geometry.affine @ to_centre, np.float64)


def to_voxels(places: Any, volume: Volume, space: Space = "lps") -> npt.NDArray[np.float64]:
    """Places in the patient as voxel coordinates of `volume`.

    Args:
        places: (..., 3) x, y, z in mm.
        volume: NIfTI or DICOM.
        space: `lps` or `ras`; `voxel` returns the numbers as they are.

    Raises:
        InputError: not finite numbers of such a shape, or a volume without a place in the patient.
    """
    values = _places(places)
    if space == "voxel":
        return values
    inverse = np.linalg.inv(_corner_affine(volume, space))
    found = np.round(values @ inverse[:3, :3].T + inverse[:3, 3], _DIGITS)
    sides = np.array(volume.shape[::-1], np.float64)
    inside = np.clip(found, 0, sides)
    return np.where(np.abs(found - inside) <= _ON_THE_BORDER, inside, found)


def to_patient(voxels: Any, volume: Volume, space: Space = "lps") -> npt.NDArray[np.float64]:
    """Voxel coordinates (..., 3) as mm, the inverse of `to_voxels`; errors are the same."""
    values = _places(voxels)
    if space == "voxel":
        return values
    affine = _corner_affine(volume, space)
    return np.asarray(values @ affine[:3, :3].T + affine[:3, 3], np.float64)


def _places(places: Any) -> npt.NDArray[np.float64]:
    array = as_array("coordinates", places)
    if array.dtype.kind not in "fiu" or array.ndim < 1 or array.shape[-1] != 3:
        raise InputError(f"coordinates {array.dtype}{array.shape}: expected (..., 3) numbers")
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError("coordinates hold NaN or infinity: expected finite numbers")
    return values


def plane_axis(volume: Volume, plane: Plane) -> int:
    """The axis of (D, H, W) that the slices of a plane are counted along.

    In an oblique volume an anatomical plane is the one of the three array planes nearest to it. A
    volume without a place in the patient counts as a stack of axial slices, H from front to back.

    Raises:
        InputError: another name, or slices across those of a 2D image.
    """
    if plane not in ("stored", *_NORMALS):
        raise InputError(f"plane {plane!r}: expected stored, axial, coronal or sagittal")
    if plane == "stored":
        return 0
    axis = 2 - _NORMALS.index(plane)
    if volume.geometry is not None:
        steps = volume.geometry.affine[:3, :3]
        along = np.abs(steps / np.linalg.norm(steps, axis=0))  # patient axis, voxel axis
        order = max(
            itertools.permutations(range(3)), key=lambda order: along[range(3), order].sum()
        )
        axis = 2 - order[_NORMALS.index(plane)]
    if axis and not volume.is_volume:
        raise InputError(f"{volume.path} is a 2D image, which has no {plane} slices")
    return axis
