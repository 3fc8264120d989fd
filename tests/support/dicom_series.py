"""A synthetic CT as a DICOM series, for tests and trials without patient data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"


def rotation(x_degrees: float, y_degrees: float, z_degrees: float) -> npt.NDArray[np.float64]:
    """(3, 3) rotation about x, then y, then z."""
    out = np.eye(3)
    for axis, degrees in enumerate((x_degrees, y_degrees, z_degrees)):
        angle = np.deg2rad(degrees)
        i, j = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        out = turn @ out
    return out


def write_dicom_series(
    folder: Path,
    volume: npt.NDArray[Any],
    *,
    directions: npt.NDArray[np.float64] | None = None,
    spacing_mm: tuple[float, float, float] = (2.5, 0.7, 0.8),
    origin_mm: tuple[float, float, float] = (-100.0, -80.0, 30.0),
    intercept: float = -1024.0,
) -> list[Path]:
    """Write a CT series with file names that do not follow the slice order.

    Args:
        folder: made if missing.
        volume: (D, H, W) whole numbers in HU, at least `intercept`.
        directions: (3, 3), columns are the directions of x, y and z in DICOM's patient frame (left,
            posterior, superior); identity by default.
        spacing_mm: along (z, y, x).
        origin_mm: position of voxel (0, 0, 0) in the patient frame.
        intercept: rescale intercept; the stored values are unsigned.

    Returns:
        The file of each slice, in slice order.
    """
    from pydicom.uid import generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    axes = np.eye(3) if directions is None else directions
    series, study = generate_uid(), generate_uid()
    files = []
    for index, plane in enumerate(volume):
        position = np.array(origin_mm) + axes[:, 2] * spacing_mm[0] * index
        dataset = _ct_slice(plane - intercept, intercept)
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = series, study
        dataset.InstanceNumber = index + 1
        dataset.ImagePositionPatient = [f"{value:.8g}" for value in position]
        cosines = np.concatenate([axes[:, 0], axes[:, 1]])
        dataset.ImageOrientationPatient = [f"{value:.10f}" for value in cosines]
        dataset.PixelSpacing = [str(spacing_mm[1]), str(spacing_mm[2])]
        dataset.SliceThickness = str(spacing_mm[0])
        files.append(folder / f"{(index * 7 + 3) % 97:03d}_{index}.dcm")
        dataset.save_as(files[-1], enforce_file_format=True)
    return files


def _ct_slice(stored: npt.NDArray[Any], intercept: float) -> Any:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, generate_uid

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(EXPLICIT_LITTLE_ENDIAN)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UID(CT_IMAGE_STORAGE)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Modality = "CT"
    dataset.PatientName, dataset.PatientID = "Synthetic", "0"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 0
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", f"{intercept:g}"
    dataset.PixelData = np.ascontiguousarray(stored, np.uint16).tobytes()
    return dataset
