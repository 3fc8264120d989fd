"""Reads MedSAM's npz files: every array's announced size is checked before it is decompressed.

`imgs` is (H, W) or (H, W, 3) for an image, (D, H, W) or (D, H, W, 3) for a volume or stack. `boxes`
(optional) is (n, 4) x_min, y_min, x_max, y_max or, for a volume, (n, 6) x_min, y_min, z_min, x_max,
y_max, z_max. In the challenge's files z_max is the object's last slice; read boxes are half-open
along z, as everywhere in this library. `spacing` (optional) is millimetres along (z, y, x).
"""

from __future__ import annotations

import struct
import tokenize
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .imaging import FloatArray
from .scans import check_voxels

MAX_BOXES_BYTES = 16 * 1024 * 1024
MAX_SPACING_BYTES = 1024

_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    tokenize.TokenError,
    RuntimeError,  # an encrypted member
    NotImplementedError,  # an unknown compression
    struct.error,
)


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
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about npy headers written by Python 2
            values = _images(archive, path)
            boxes = _array(archive, "boxes", MAX_BOXES_BYTES, path) if with_boxes else None
            spacing = _array(archive, "spacing", MAX_SPACING_BYTES, path)
    except InputError:
        raise
    except _DAMAGED as error:
        raise InputError(f"{path} is not a readable npz file: {error}") from error
    return NpzContent(
        values,
        None if boxes is None else _half_open(boxes, len(values), path),
        None if spacing is None else _spacing(spacing, path),
    )


def _images(archive: zipfile.ZipFile, path: Path) -> npt.NDArray[Any]:
    shape = _announced_shape(archive, "imgs", path)
    if shape is None:
        raise InputError(
            f"{path}: no array `imgs` among {sorted(archive.namelist())[:8]}; expected a MedSAM "
            "npz with imgs (H, W), (H, W, 3), (D, H, W) or (D, H, W, 3)"
        )
    grey = len(shape) == 2 or (len(shape) == 3 and shape[2] not in (1, 2, 3, 4))
    colour = len(shape) in (3, 4) and shape[-1] == 3
    # (H, W, 1), (H, W, 2) and (H, W, 4) would otherwise pass as very narrow volumes.
    if not grey and not colour:
        raise InputError(
            f"{path}: imgs of shape {shape}; expected (H, W), (H, W, 3), (D, H, W) or (D, H, W, 3)"
        )
    full = shape if len(shape) == (4 if colour else 3) else (1, *shape)
    check_voxels(full[:3], path)
    return _member(archive, "imgs").reshape(full)


def _announced_shape(
    archive: zipfile.ZipFile, name: str, path: Path, limit_bytes: int | None = None
) -> tuple[int, ...] | None:
    """The shape that an array's header gives, without reading the array; None if there is none.

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
    return tuple(int(side) for side in shape)


def _member(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    with archive.open(f"{name}.npy") as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def _array(
    archive: zipfile.ZipFile, name: str, limit_bytes: int, path: Path
) -> npt.NDArray[Any] | None:
    if _announced_shape(archive, name, path, limit_bytes) is None:
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
    if spacing.shape != (3,) or spacing.dtype.kind not in "iuf" or not (spacing > 0).all():
        raise InputError(f"{path}: spacing {spacing}; expected three lengths in mm (z, y, x)")
    return float(spacing[0]), float(spacing[1]), float(spacing[2])
