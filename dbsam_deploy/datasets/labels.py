"""Label maps in NIfTI, on exactly the grid of their images."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..images.nifti import count_volumes, read_nifti
from ..images.scans import ScanGeometry, require_nibabel
from ..images.volumes import Volume

ADVICE = "resample the labels onto the images' grid yourself; it is never done here"
SAME_PLACE = 0.05
"""By how much of a voxel's shortest side two grids may differ: more than what rounding leaves."""
_FLOAT_NOISE = 1e-4
"""Differences, in voxels, that single precision alone leaves; nothing is said about them."""


@dataclass(frozen=True)
class ReadLabels:
    """Labels of an image or volume.

    Attributes:
        values: (D, H, W) whole numbers, 0 outside every object.
        names: label → name, of the objects whose name is known.
        notes: what was made of the file.
    """

    values: npt.NDArray[Any]
    names: dict[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def with_note(self, *notes: str) -> ReadLabels:
        """The same with further remarks."""
        return dataclasses.replace(self, notes=(*self.notes, *notes))

    def named(self, names: dict[int, str], ignored: int | None, path: Path) -> ReadLabels:
        """The same with names, where a data set gives them.

        Raises:
            InputError: a label that it does not name.
        """
        unknown = sorted(labels_in(self.values) - {0, ignored, *names})
        if names and unknown:
            raise InputError(
                f"{path} holds label {unknown[0]}, which dataset.json does not name; it has "
                f"{', '.join(f'{label} {name}' for label, name in names.items())}"
            )
        return dataclasses.replace(self, names=names)


def read_nifti_labels(path: Path, volume: Volume) -> ReadLabels:
    """Read a label map in NIfTI.

    Args:
        path: the file.
        volume: its images, with their geometry.

    Raises:
        InputError: another grid than the images', or values that are not whole numbers.
        EngineError: nibabel is not installed.
    """
    if (count := count_volumes(path)) > 1:
        raise InputError(f"{path} holds {count} volumes; expected one label map")
    scan = read_nifti(path)
    notes = check_same_grid(scan.geometry, volume, path)
    return ReadLabels(_whole(scan.values, path), notes=notes)


def check_same_grid(found: ScanGeometry | None, volume: Volume, path: Path) -> tuple[str, ...]:
    """Refuse labels that lie on another grid than their images; remarks on rounding.

    Args:
        found: of the labels.
        volume: the images.
        path: of the labels.

    Raises:
        InputError: another shape, or voxels more than `SAME_PLACE` of a voxel elsewhere.
    """
    expected = volume.geometry
    if found is None or expected is None:
        raise InputError(f"{path}: labels or images have no place in space to compare")
    sizes, wanted = _sizes(found), _sizes(expected)
    if sizes != wanted:
        raise InputError(
            f"{path} has {_text(sizes)} voxels, its images {volume.path} {_text(wanted)}: {ADVICE}"
        )
    side = float(np.linalg.norm(expected.affine[:3, :3], axis=0).min())
    corners = np.array([(*c, 1) for c in itertools.product(*((0, size - 1) for size in sizes))])
    apart = float(np.linalg.norm(corners @ (found.affine - expected.affine).T, axis=1).max())
    if apart > SAME_PLACE * side:
        axes = [_axes(geometry) for geometry in (found, expected)]
        turned = f"its axes run {axes[0]}, theirs {axes[1]}: " if axes[0] != axes[1] else ""
        raise InputError(
            f"{path} lies up to {apart:.3g} mm beside its images {volume.path}: {turned}{ADVICE}"
        )
    if apart > _FLOAT_NOISE * side:
        return (f"{path.name} lies {apart:.2g} mm beside its images, taken for rounding",)
    return ()


def _sizes(geometry: ScanGeometry) -> tuple[int, ...]:
    return (*geometry.shape[:3], *(1,) * (3 - len(geometry.shape)))


def _text(sizes: tuple[int, ...]) -> str:
    return "×".join(map(str, sizes))


def _axes(geometry: ScanGeometry) -> str:
    return "".join(require_nibabel().aff2axcodes(geometry.affine))


def _whole(values: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    """Values as whole numbers: many programs save a label map as floats."""
    if values.dtype.kind in "iu":
        return values
    labels = np.empty(values.shape, np.int32)
    for plane, out in zip(values, labels, strict=True):
        whole = np.isfinite(plane) & (plane == np.rint(plane)) & (np.abs(plane) < 2**31)
        if not whole.all():
            raise InputError(
                f"{path} holds {plane[~whole].flat[0]:g}; expected whole numbers, one label a "
                "voxel: a map of probabilities has to be thresholded first"
            )
        out[:] = plane
    return labels


def labels_in(values: npt.NDArray[Any]) -> set[int]:
    """The numbers that occur in (D, H, W) labels; counting is much faster than sorting."""
    found: set[int] = set()
    for plane in values:
        countable = plane.min() >= 0 and plane.max() < 2**16
        found |= set(
            (np.flatnonzero(np.bincount(plane.ravel())) if countable else np.unique(plane)).tolist()
        )
    return found
