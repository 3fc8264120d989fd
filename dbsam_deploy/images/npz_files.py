"""Reads MedSAM's npz files: every array's announced size is checked before it is decompressed.

`imgs` is (H, W) or (H, W, 3) for an image, (D, H, W) or (D, H, W, 3) for a volume or stack. `boxes`
(optional) is (n, 4) x_min, y_min, x_max, y_max or, for a volume, (n, 6) x_min, y_min, z_min, x_max,
y_max, z_max. In the challenge's files z_max is the object's last slice; read boxes are half-open
along z, as everywhere in this library. `spacing` (optional) is millimetres along (z, y, x).
"""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..core.imaging import FloatArray
from ..files.damage import DAMAGED, reason_of
from ..files.regular import regular_size
from ..files.zip_files import open_zip
from .scans import check_channels_last, check_voxels

MAX_BOXES_BYTES = 16 * 1024 * 1024
MAX_SPACING_BYTES = 1024
MAX_NAMES_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class NpzContent:
    """What a MedSAM npz holds.

    Attributes:
        values: (D, H, W) or (D, H, W, 3) as stored, D = 1 for an image.
        boxes: (n, 4), or (n, 6) x0, y0, z0, x1, y1, z1 covering slices z0 … z1 - 1.
        spacing_mm: distance between voxels along (z, y, x).
    """

    values: npt.NDArray[Any]
    boxes: FloatArray | None
    spacing_mm: tuple[float, float, float] | None


def read_npz(path: Path, *, with_boxes: bool = True) -> NpzContent:
    """Read `imgs`, `spacing` and, if `with_boxes`, `boxes`.

    Raises:
        InputError: damaged, pickled or too large, no `imgs`, or arrays of another shape.
    """
    with _opened(path) as archive:
        values = _images(archive, "imgs", path)
        boxes = _array(archive, "boxes", MAX_BOXES_BYTES, path) if with_boxes else None
        spacing = _array(archive, "spacing", MAX_SPACING_BYTES, path)
    return NpzContent(
        values,
        None if boxes is None else _half_open(boxes, len(values), path),
        None if spacing is None else _spacing(spacing, path),
    )


def read_image_header(path: Path, key: str = "imgs") -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape (D, H, W) or (D, H, W, 3) and dtype of the images under `key`, without reading them.

    Raises:
        InputError: as `read_npz`.
    """
    with _opened(path) as archive:
        return _image_shape(archive, key, path)


def read_images(path: Path, key: str = "imgs") -> npt.NDArray[Any]:
    """The images under `key` as stored, (D, H, W) or (D, H, W, 3), D = 1 for one image.

    Raises:
        InputError: as `read_npz`.
    """
    with _opened(path) as archive:
        return _images(archive, key, path)


def read_array(path: Path, name: str, limit_bytes: int) -> npt.NDArray[Any]:
    """One array of at most `limit_bytes`.

    Raises:
        InputError: damaged, pickled or too large, or no array of this name.
    """
    with _opened(path) as archive:
        found = _array(archive, name, limit_bytes, path)
    if found is None:
        raise InputError(f"{path}: no array `{name}`")
    return found


def has_labels(path: Path) -> bool:
    """Whether there is a label map `gts`.

    Raises:
        InputError: damaged.
    """
    with _opened(path) as archive:
        return "gts.npy" in archive.namelist()


def read_labels(path: Path, shape: tuple[int, ...], key: str = "gts") -> npt.NDArray[Any]:
    """The label map under `key` of images of (D, H, W) = `shape`, as stored.

    Raises:
        InputError: damaged, no `key`, not whole numbers, or another shape than the images'.
    """
    with _opened(path) as archive:
        found = _announced(archive, key, path)
        if found is None:
            raise InputError(f"{path}: no array `{key}`; expected a label map of {shape}")
        check_label_map(*found, shape, path, key)
        return _member(archive, key).reshape(shape)


def read_label_names(path: Path) -> dict[int, str]:
    """Label value → name, from `label_ids` and `label_names`; empty where a file has neither.

    Raises:
        InputError: damaged, only one of the two, or arrays that do not fit together.
    """
    with _opened(path) as archive:
        ids = _array(archive, "label_ids", MAX_NAMES_BYTES, path)
        names = _array(archive, "label_names", MAX_NAMES_BYTES, path)
    if ids is None and names is None:
        return {}
    fits = (
        ids is not None
        and names is not None
        and (ids.ndim, ids.dtype.kind in "iu", names.dtype.kind) == (1, True, "U")
        and ids.shape == names.shape
    )
    if ids is None or names is None or not fits:
        found = [None if array is None else f"{array.dtype}{array.shape}" for array in (ids, names)]
        raise InputError(
            f"{path}: label_ids and label_names are {found}; expected n whole numbers and n "
            "strings, or neither"
        )
    return dict(zip(ids.tolist(), names.tolist(), strict=True))


def check_label_map(
    found: tuple[int, ...],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    path: Path,
    key: str = "gts",
) -> None:
    """Refuse labels of shape `found` that are not whole numbers for images of (D, H, W) = `shape`.

    Raises:
        InputError: another shape ((H, W) may stand for D = 1) or kind of number.
    """
    full = (1, *found) if len(found) == 2 else found
    if full != shape or dtype.kind not in "biu":
        raise InputError(
            f"{path}: {key} {dtype}{found}, expected whole numbers of shape {shape}, one for each "
            "pixel of imgs"
        )


def open_npy(path: Path) -> npt.NDArray[Any]:
    """A plain `.npy` file as a read-only memory map: its size is checked, nothing is read yet.

    Raises:
        InputError: damaged, truncated, or pickled objects.
    """
    regular_size(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about npy headers written by Python 2
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except DAMAGED as error:
        raise InputError(
            f"{path} is not a readable npy file of numbers: {reason_of(error)}"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, with what a damaged one raises turned into one `InputError`."""
    try:
        with open_zip(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about npy headers written by Python 2
            yield archive
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"{path} is not a readable npz file: {reason_of(error)}") from error


def _image_shape(
    archive: zipfile.ZipFile, key: str, path: Path
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    found = _announced(archive, key, path)
    if found is None:
        raise InputError(
            f"{path}: no array `{key}` among {sorted(archive.namelist())[:8]}; expected a MedSAM "
            f"npz with {key} (H, W), (H, W, 3), (D, H, W) or (D, H, W, 3)"
        )
    labels = _announced(archive, "gts", path)
    is_stack = "spacing.npy" in archive.namelist() or (labels is not None and labels[0] == found[0])
    shape = stack_shape(found[0], key, path, is_stack=is_stack)
    check_voxels(shape[:3], path, found[1].itemsize * math.prod(shape[3:]))
    return shape, found[1]


def _images(archive: zipfile.ZipFile, key: str, path: Path) -> npt.NDArray[Any]:
    shape, _ = _image_shape(archive, key, path)  # before anything is decompressed
    return _member(archive, key).reshape(shape)


def stack_shape(
    shape: tuple[int, ...], key: str, path: Path, *, is_stack: bool = False
) -> tuple[int, ...]:
    """The shape of images `key` as (D, H, W) or (D, H, W, 3).

    Args:
        shape: as stored.
        key: for messages.
        path: for messages.
        is_stack: whether labels of that shape or a spacing tell that (3, H, W) is three slices.

    Raises:
        InputError: another number of axes or of channels, or too large.
    """
    grey = len(shape) == 2 or (len(shape) == 3 and shape[2] not in (1, 2, 3, 4))
    colour = len(shape) in (3, 4) and shape[-1] == 3
    # (H, W, 1), (H, W, 2) and (H, W, 4) would otherwise pass as very narrow volumes.
    if not grey and not colour:
        raise InputError(
            f"{path}: {key} of shape {shape}; expected (H, W), (H, W, 3), (D, H, W) or (D, H, W, 3)"
        )
    if len(shape) == 3 and not is_stack:
        check_channels_last(shape, f"{path}: {key}", "with three slices their `spacing`")
    full = shape if len(shape) == (4 if colour else 3) else (1, *shape)
    check_voxels(full[:3], path)
    return full


def _announced(
    archive: zipfile.ZipFile, name: str, path: Path, limit_bytes: int | None = None
) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    """Shape and dtype that an array's header gives, without reading it; None if there is none.

    Raises:
        InputError: pickled objects, or a size that is not the zip directory's or is too large.
    """
    if f"{name}.npy" not in archive.namelist():
        return None
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise InputError(f"{path}: {name} in npy format {version}; expected 1.0 or 2.0")
        shape, _, dtype = readers[version](stream)
        start = stream.tell()
    if dtype.hasobject:
        raise InputError(
            f"{path}: {name} holds pickled Python objects, which can run code and are never "
            "loaded; save it as a plain array of numbers"
        )
    size = dtype.itemsize
    for side in shape:
        size *= int(side)  # Python integers do not overflow
    if min(shape, default=1) < 0 or size != info.file_size - start:
        raise InputError(f"{path}: {name} of shape {shape} does not match its stored size")
    if limit_bytes is not None and size > limit_bytes:
        raise InputError(f"{path}: {name} has {size} bytes; at most {limit_bytes} are read")
    return tuple(int(side) for side in shape), dtype


def _member(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    with archive.open(f"{name}.npy") as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def _array(
    archive: zipfile.ZipFile, name: str, limit_bytes: int, path: Path
) -> npt.NDArray[Any] | None:
    if _announced(archive, name, path, limit_bytes) is None:
        return None
    return _member(archive, name)


def _half_open(boxes: npt.NDArray[Any], depth: int, path: Path) -> FloatArray:
    columns = boxes.shape[1] if boxes.ndim == 2 else 0
    if boxes.dtype.kind not in "iuf" or columns not in (4, 6) or (columns == 6 and depth == 1):
        raise InputError(
            f"{path}: boxes {boxes.dtype}{boxes.shape}; expected numbers of shape (n, 4), or "
            "(n, 6) for a volume; give --box or --box3d instead"
        )
    values = boxes.astype(np.float32)
    if columns == 6:
        # Some files already name the slice after the last, so the end is capped as the challenge's
        # own inference does.
        values[:, 5] = np.where(values[:, 5] == depth, depth, values[:, 5] + 1)
    return values


def _spacing(spacing: npt.NDArray[Any], path: Path) -> tuple[float, float, float]:
    is_three = spacing.shape == (3,) and spacing.dtype.kind in "iuf"
    if not is_three or not ((spacing > 0) & np.isfinite(spacing)).all():
        raise InputError(f"{path}: spacing {spacing}; expected three lengths in mm (z, y, x)")
    return float(spacing[0]), float(spacing[1]), float(spacing[2])
