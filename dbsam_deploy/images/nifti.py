"""Reads NIfTI: what the header announces is checked first, the gzip checksum at the end."""

from __future__ import annotations

import gzip
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import InputError
from ..files.damage import DAMAGED, reason_of
from ..files.regular import regular_size
from .scans import Scan, ScanGeometry, check_voxels, require_nibabel

NIFTI1_BYTES, NIFTI2_BYTES = 348, 540
MAX_HEADER_BYTES = 16 * 1024 * 1024
"""Header with its extensions, which are passed over."""
MAX_NIFTI_BYTES = 16 * 1024 * 1024 * 1024
"""A whole file after it is decompressed; one volume of it is kept, see `scans.MAX_VOLUME_BYTES`."""
SLACK_BYTES = 4096
"""What may follow the last voxel: some programs fill up a block."""
_BLOCK_BYTES = 1024 * 1024


def read_nifti(path: Path, *, volume: int | None = None) -> Scan:
    """Read one 3D (or 2D) volume of a `.nii` or `.nii.gz` file.

    The header is checked before any voxel is read, extensions are never read, and of a `.nii.gz`
    the checksum and length at its end are compared with what was read. The extreme value of a type
    that stands alone, far from all others, is taken for a fill value, see `Scan.padding`.

    Args:
        path: the file.
        volume: which one of a 4D file, from 0.

    Raises:
        InputError: damaged, 4D without `volume`, complex or colour data, too large, a size that is
            not the header's, or a singular affine.
        EngineError: nibabel is not installed.
    """
    nibabel = require_nibabel()
    size, compressed = regular_size(path), _is_compressed(path)
    with _opened(path) as stream:
        header = _nifti_header(nibabel, stream, path)
        shape, chosen = _volume_of(header, volume, path)
        announced = _check_size(header, None if compressed else size, path)
        affine = _affine(header, path)
        stored = _stored(nibabel, stream, header, chosen)
        if compressed:
            _read_to_the_end(stream, announced, path)  # compares checksum and length
    sizes = shape[:3] + (1,) * (3 - len(shape))
    stored = stored.reshape(sizes).transpose(2, 1, 0)
    padding = _fill_values(stored)
    dx, dy, dz = (float(step) for step in np.linalg.norm(affine[:3, :3], axis=0))
    return Scan(
        _rescaled(stored, header),
        padding,
        spacing_mm=(dz, dy, dx),
        geometry=ScanGeometry(affine, shape, header),
        files=(path,),
    )


def count_volumes(path: Path) -> int:
    """How many volumes a file holds, as its header says; nothing else of it is read.

    Raises:
        InputError: no NIfTI file.
        EngineError: nibabel is not installed.
    """
    nibabel = require_nibabel()
    regular_size(path)
    with _opened(path) as stream:
        shape = _nifti_header(nibabel, stream, path).get_data_shape()
    return math.prod(int(side) for side in shape[3:])


def _is_compressed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file's bytes, unpacked, with what a damaged one raises turned into one `InputError`."""
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about numbers in a header that are no numbers
            yield gzip.GzipFile(fileobj=file) if _is_compressed(path) else file
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"{path} is not a readable NIfTI file: {reason_of(error)}") from error


def _nifti_header(nibabel: Any, stream: Any, path: Path) -> Any:
    """The header alone: nibabel would read extensions of any announced length with it."""
    start = stream.read(NIFTI2_BYTES)
    is_second = start[:4] in (NIFTI2_BYTES.to_bytes(4, "little"), NIFTI2_BYTES.to_bytes(4, "big"))
    kind = nibabel.Nifti2Header if is_second else nibabel.Nifti1Header
    block = start[: NIFTI2_BYTES if is_second else NIFTI1_BYTES]
    log = logging.getLogger("nibabel.global")
    was_disabled, log.disabled = log.disabled, True  # it comments on headers on stderr
    try:
        header = kind(block)
    except (nibabel.spatialimages.HeaderDataError, nibabel.wrapstruct.WrapStructError) as error:
        raise InputError(f"{path} is not a readable NIfTI file: {reason_of(error)}") from error
    finally:
        log.disabled = was_disabled
    offset = float(header["vox_offset"])
    if not len(block) < offset <= MAX_HEADER_BYTES:
        raise InputError(
            f"{path}: its voxels start at byte {offset:g}; expected {len(block) + 4} to "
            f"{MAX_HEADER_BYTES}: its header is damaged, or its extensions are too long"
        )
    return header


def _volume_of(
    header: Any, volume: int | None, path: Path
) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Shape of the volume that is read, and its place in the stored array.

    Raises:
        InputError: not one volume of real numbers, or too large.
    """
    shape = tuple(int(side) for side in header.get_data_shape())
    if not len(shape) >= 2 or set(shape[4:]) - {1} or min(shape, default=0) < 1:
        raise InputError(f"{path}: array of shape {shape}; expected one NIfTI volume (x, y, z)")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels of type {dtype}; expected real numbers")
    check_voxels((shape[:3] + (1,) * (3 - len(shape)))[::-1], path, dtype.itemsize)
    count = shape[3] if len(shape) > 3 else 1
    if volume is None and count > 1:
        raise InputError(
            f"{path}: array of shape {shape} holds {count} volumes; expected one, or which with "
            f"--volume 0 to {count - 1}"
        )
    if volume is not None and not 0 <= volume < count:
        raise InputError(f"{path}: volume {volume}; it holds {count}, counted from 0")
    if count == 1:
        return shape, (...,)
    return shape[:3], (..., volume, *[0] * len(shape[4:]))


def _check_size(header: Any, file_bytes: int | None, path: Path) -> int:
    """What the header announces in bytes, compared with the file and the limit, before reading."""
    announced = int(header["vox_offset"]) + header.get_data_dtype().itemsize * math.prod(
        int(side) for side in header.get_data_shape()
    )
    if announced > MAX_NIFTI_BYTES:
        raise InputError(
            f"{path}: {announced} bytes when decompressed; at most {MAX_NIFTI_BYTES} are read"
        )
    if file_bytes is not None and not announced <= file_bytes <= announced + SLACK_BYTES:
        raise InputError(
            f"{path}: {file_bytes} bytes, but its header announces {announced}: the file is "
            "truncated or its header damaged"
        )
    return announced


def _affine(header: Any, path: Path) -> npt.NDArray[np.float64]:
    affine = np.asarray(header.get_best_affine(), np.float64)
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise InputError(f"{path}: its affine does not place voxels in space; repair the header")
    return affine


def _stored(nibabel: Any, stream: Any, header: Any, chosen: tuple[Any, ...]) -> npt.NDArray[Any]:
    """The stored numbers, without slope and intercept."""
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    proxy = nibabel.arrayproxy.ArrayProxy(
        stream, (shape, dtype, int(header["vox_offset"])), mmap=False
    )
    values = np.asarray(proxy[chosen])
    return values if dtype.isnative else values.astype(dtype.newbyteorder("="))


def _read_to_the_end(stream: gzip.GzipFile, announced: int, path: Path) -> None:
    """Read other volumes and what follows them, so that gzip checks what it unpacked.

    Raises:
        InputError: more than `SLACK_BYTES` follow the last voxel.
    """
    left = announced - stream.tell() + SLACK_BYTES + 1
    while left > 0 and (content := stream.read(min(left, _BLOCK_BYTES))):
        left -= len(content)
    if left <= 0:
        raise InputError(
            f"{path}: more than {SLACK_BYTES} bytes follow the voxels that its header announces: "
            "its header is damaged"
        )


def _rescaled(stored: npt.NDArray[Any], header: Any) -> npt.NDArray[Any]:
    """`stored` with the header's slope and intercept, in a type that holds the result."""
    slope, inter = header.get_slope_inter()
    slope, inter = 1.0 if slope is None else slope, 0.0 if inter is None else inter
    if (slope, inter) == (1.0, 0.0):
        return stored
    narrow = stored.dtype.itemsize <= 2 or stored.dtype == np.float32
    values: npt.NDArray[Any] = stored.astype(np.float32 if narrow else np.float64)
    with np.errstate(over="ignore"):  # infinity is refused later
        values *= slope
        values += inter
    return values


def _fill_values(stored: npt.NDArray[Any]) -> npt.NDArray[np.bool_] | None:
    """(D, H, W) bool, where the type's lowest or highest value fills gaps; None where it does not.

    It does where it lies farther from all other values than twice their range; saturated or
    rescaled voxels lie next to others.
    """
    if stored.dtype.itemsize == 1 or not (stored.dtype.kind in "iu" or np.isfinite(stored).all()):
        return None
    ends = _extremes(stored.dtype)
    fill = np.isin(stored, ends)
    if not fill.any() or fill.all():
        return None
    rest = stored[~fill]
    low, high = _python(rest.min()), _python(rest.max())
    here = [_python(value) for value in np.unique(stored[fill])]
    alone = [end for end in here if max(low - end, end - high) / 2 > high - low > 0]
    return np.isin(stored, np.array(alone, stored.dtype)) if alone else None


def _extremes(dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if dtype.kind in "iu":
        ends = [np.iinfo(dtype).max, *[np.iinfo(dtype).min] * (dtype.kind == "i")]
        return np.array(ends, dtype)
    single = float(np.finfo(np.float32).max)
    ends_of = [single] if dtype.itemsize == 4 else [single, float(np.finfo(np.float64).max)]
    return np.array([sign * end for end in ends_of for sign in (-1, 1)], dtype)


def _python(value: Any) -> int | float:
    return int(value) if value.dtype.kind in "iu" else float(value)
