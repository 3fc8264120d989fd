"""NIfTI files and DICOM series as slices with their place in the patient, and label maps back.

Axis convention: a NIfTI array is indexed (x, y, z). Slices are taken along z, and within a slice x
is the array's first axis and y its second, whatever anatomical directions the affine gives them.
So a box (x0, y0, x1, y1) is `array[x0:x1, y0:y1, z]`, and nothing is reoriented or resampled on the
way in or out. In memory slices are (D, H, W) = (z, y, x).
"""

from __future__ import annotations

import gzip
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

DEFLATED_TRANSFER_SYNTAX = "1.2.840.10008.1.2.1.99"
# What pydicom raises on a damaged file depends on the element it trips over.
_DAMAGED_DICOM = (
    ArithmeticError,
    AttributeError,
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


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


@dataclass(frozen=True)
class Scan:
    """One scan as stored.

    Attributes:
        values: (D, H, W) intensities after the file's own rescaling, or (1, H, W, 3) uint8 RGB.
        spacing_mm: distance between voxels along (z, y, x); None where the file has none.
        geometry: None where the file does not place its pixels (a photograph or X-ray in DICOM).
        files: the files it was read from.
        padding: (D, H, W) bool, pixels that hold no measurement; None where there are none.
    """

    values: npt.NDArray[Any]
    spacing_mm: tuple[float, float, float] | None
    geometry: ScanGeometry | None
    files: tuple[Path, ...]
    padding: npt.NDArray[np.bool_] | None = None


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


def require_nibabel() -> ModuleType:
    """The package nibabel.

    Raises:
        MissingError: it is not installed.
    """
    return require("nibabel", extra="nifti", what_for="a NIfTI file")


_PLACE = ("dim_info", "pixdim", "xyzt_units", "qform_code", "sform_code")
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
        image.set_qform(None, code="unknown")
    if not compressed:
        return bytes(image.to_bytes())
    # mtime 0: the same labels give the same file
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)


@contextmanager
def _reading_dicom(path: Path) -> Iterator[Any]:
    """pydicom, with its warnings muted and its errors turned into one `InputError`."""
    pydicom = require("pydicom", extra="dicom", what_for="DICOM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield pydicom
        except InputError:
            raise
        except (
            *_DAMAGED_DICOM,
            pydicom.errors.InvalidDicomError,
            pydicom.errors.BytesLengthException,
        ) as error:
            raise InputError(f"{path} is not readable DICOM: {error}") from error


def read_dicom(path: Path) -> Scan:
    """Read a DICOM series: a folder with one series, or one file with one image.

    Files of a folder that are not DICOM are passed over. Slices are sorted by their position along
    the slice normal; values are rescaled with each slice's slope and intercept (HU for CT).

    Raises:
        InputError: no DICOM, several series, slices that differ in size, orientation or spacing,
            missing slices, multi-frame or unsupported pixel data.
        EngineError: pydicom is not installed.
    """
    with _reading_dicom(path) as pydicom:
        files = sorted(p for p in path.iterdir() if _is_dicom(p)) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path}: no DICOM file in this folder")
        slices = [(file, _read_header(pydicom, file)) for file in files]
        series = {str(header.get("SeriesInstanceUID", "")) for _, header in slices}
        if len(series) > 1:
            raise InputError(
                f"{path} holds {len(series)} DICOM series: put one series in a folder of its own"
            )
        _check_alike([header for _, header in slices], path)
        slices, geometry, spacing_mm = _arrange(slices, path)
        rows, columns = int(slices[0][1].Rows), int(slices[0][1].Columns)
        check_voxels((len(slices), rows, columns), path)
        values = np.stack([_pixels(pydicom, file) for file, _ in slices])
    return Scan(values, spacing_mm, geometry, tuple(file for file, _ in slices))


def _is_dicom(path: Path) -> bool:
    """Whether the file carries DICOM's preamble (a DICOMDIR index does not count)."""
    if not path.is_file() or path.name.upper() == "DICOMDIR":
        return False
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _read_header(pydicom: Any, file: Path) -> Any:
    meta = pydicom.filereader.read_file_meta_info(file)
    if str(meta.get("TransferSyntaxUID", "")) == DEFLATED_TRANSFER_SYNTAX:
        raise InputError(f"{file}: deflated DICOM is not accepted; convert it with dcmconv first")
    header = pydicom.dcmread(file, stop_before_pixels=True)
    if int(header.get("NumberOfFrames", 1) or 1) > 1:
        raise InputError(f"{file}: multi-frame DICOM; convert it to NIfTI first (dcm2niix)")
    return header


def _check_alike(headers: list[Any], path: Path) -> None:
    for name in ("Rows", "Columns", "PhotometricInterpretation", "SamplesPerPixel"):
        found = {str(header.get(name)) for header in headers}
        if len(found) > 1 or "None" in found:
            raise InputError(
                f"{path}: {name} is {', '.join(sorted(found))}; expected one value in all slices"
            )
    kind, samples = headers[0].PhotometricInterpretation, int(headers[0].SamplesPerPixel)
    colour = kind == "RGB" and samples == 3 and len(headers) == 1
    if not colour and (kind not in ("MONOCHROME1", "MONOCHROME2") or samples != 1):
        raise InputError(
            f"{path}: pixels are {kind} with {samples} samples; expected MONOCHROME1 or "
            "MONOCHROME2, or one RGB image; export it as PNG"
        )
    for name in ("ImageOrientationPatient", "PixelSpacing"):
        found_values = [header.get(name) for header in headers]
        if any(value is None for value in found_values):
            if len(headers) > 1:
                raise InputError(f"{path}: {name} is missing, so its slices cannot be ordered")
            continue
        values = np.array(found_values, np.float64)
        if not np.isfinite(values).all() or not np.allclose(values, values[0], rtol=0, atol=1e-3):
            raise InputError(f"{path}: {name} differs between slices; expected one straight stack")


def _arrange(
    slices: list[tuple[Path, Any]], path: Path
) -> tuple[list[tuple[Path, Any]], ScanGeometry | None, tuple[float, float, float] | None]:
    """Slices in order along the normal, their geometry, and the spacing (z, y, x) in mm."""
    first = slices[0][1]
    placed = [header.get("ImagePositionPatient") for _, header in slices]
    if first.get("ImageOrientationPatient") is None or any(p is None for p in placed):
        if len(slices) > 1:
            raise InputError(
                f"{path}: ImagePositionPatient is missing, so its slices cannot be ordered"
            )
        return slices, None, None
    along_x, along_y = np.array(first.ImageOrientationPatient, np.float64).reshape(2, 3)
    normal = np.cross(along_x, along_y)
    if abs(float(np.linalg.norm(normal)) - 1) > 1e-2 or first.get("PixelSpacing") is None:
        raise InputError(f"{path}: its orientation or PixelSpacing is not valid; repair the header")
    positions = np.array(placed, np.float64)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    step = normal * float(first.get("SliceThickness") or 1.0)
    if len(slices) > 1:
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
        length = float(np.linalg.norm(step))
        expected = positions[0] + np.arange(len(slices))[:, None] * step
        off = np.linalg.norm(positions - expected, axis=1)
        if not length > 1e-3 or float(off.max()) > 0.1 * length:
            raise InputError(
                f"{path}: slices are not evenly spaced (mean step {length:.3f} mm, one is "
                f"{float(off.max()):.3f} mm off): one is missing or stored twice"
            )
    row_mm, column_mm = (float(value) for value in first.PixelSpacing)
    affine = np.eye(4)
    affine[:3] = np.column_stack([along_x * column_mm, along_y * row_mm, step, positions[0]])
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # left, posterior → right, anterior
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise InputError(f"{path}: its position and spacing do not place voxels in space")
    geometry = ScanGeometry(affine, (int(first.Columns), int(first.Rows), len(slices)))
    ordered = [slices[index] for index in order]
    return ordered, geometry, (float(np.linalg.norm(step)), row_mm, column_mm)


def _pixels(pydicom: Any, file: Path) -> npt.NDArray[Any]:
    """(H, W) rescaled values of one slice (uint8 where nothing is rescaled), or (H, W, 3) RGB."""
    dataset = pydicom.dcmread(file)
    pixels = dataset.pixel_array
    if pixels.ndim == 3 or dataset.PhotometricInterpretation == "RGB":
        if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
            raise InputError(f"{file}: RGB of type {pixels.dtype}; expected 8 bits a channel")
        return np.asarray(pixels)
    if dataset.PhotometricInterpretation == "MONOCHROME1":  # the lowest value is white: mirror it
        mirror = -1 if int(dataset.PixelRepresentation) else (1 << int(dataset.BitsStored)) - 1
        pixels = (mirror - pixels.astype(np.int64)).astype(pixels.dtype)
    slope = float(dataset.get("RescaleSlope", 1) or 1)
    intercept = float(dataset.get("RescaleIntercept", 0) or 0)
    if pixels.dtype != np.uint8 or (slope, intercept) != (1.0, 0.0):
        pixels = pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    return np.asarray(pixels)
