"""A synthetic CT as a DICOM series, for tests and trials without patient data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2.1"
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
    step: Sequence[float] | None = None,
    digits: tuple[int, int] = (6, 10),
    **values: object,
) -> list[Path]:
    """Write a CT series with file names that do not follow the slice order.

    Args:
        folder: made if missing.
        volume: (D, H, W) whole numbers in HU, at least `intercept`.
        directions: (3, 3), columns are x, y and z in DICOM's patient frame (left, posterior,
            superior); identity by default.
        spacing_mm: along (z, y, x).
        origin_mm: position of voxel (0, 0, 0) in the patient frame.
        intercept: rescale intercept; the stored values are unsigned.
        step: mm from one slice to the next, where it is not along z.
        digits: behind the point, of positions and of directions.
        values: further elements of every file.

    Returns:
        The file of each slice, in slice order.
    """
    from pydicom.uid import generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    axes, series, study = np.eye(3), generate_uid(), generate_uid()
    axes = axes if directions is None else directions
    along = axes[:, 2] * spacing_mm[0] if step is None else np.array(step)
    files = []
    for index, plane in enumerate(volume):
        dataset = ct_slice(plane - intercept, intercept)
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = series, study
        dataset.InstanceNumber = index + 1
        position = [f"{value:.{digits[0]}f}" for value in np.array(origin_mm) + along * index]
        dataset.ImagePositionPatient = position
        cosines = axes[:, :2].T.ravel()
        dataset.ImageOrientationPatient = [f"{value:.{digits[1]}f}" for value in cosines]
        dataset.PixelSpacing = [str(spacing_mm[1]), str(spacing_mm[2])]
        dataset.SliceThickness = str(spacing_mm[0])
        dataset.update(values)
        files.append(folder / f"{(index * 60 + 90) % 97:03d}_{index}.dcm")
        dataset.save_as(files[-1], enforce_file_format=True)
    return files


def write_enhanced(
    path: Path,
    volume: npt.NDArray[Any],
    *,
    depths_mm: Sequence[float],
    intercepts: Sequence[float] | None = None,
    directions: npt.NDArray[np.float64] | None = None,
    **values: object,
) -> Path:
    """Write one enhanced CT file whose frames lie at `depths_mm` along z.

    Args:
        path: the file.
        volume: (D, H, W) whole numbers in HU, at least the intercept of their frame.
        depths_mm: (D,) in the order of the frames.
        intercepts: of each frame; by default one of -1024 in the shared functional groups.
        directions: (3, 3), columns are x, y and z, where they are not those of the patient; each
            frame then has its own, as some makers write it.
        values: further elements.
    """
    from pydicom.sequence import Sequence as Items

    each = [-1024.0] * len(volume) if intercepts is None else intercepts
    stored = np.stack([plane - low for plane, low in zip(volume, each, strict=True)])
    dataset = ct_slice(stored, 0)
    del dataset.RescaleSlope, dataset.RescaleIntercept
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = ENHANCED_CT_IMAGE_STORAGE
    dataset.NumberOfFrames = len(volume)
    shared = _item(
        PlaneOrientationSequence=Items([_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]),
        PixelMeasuresSequence=Items([_item(PixelSpacing=["0.8", "0.7"], SliceThickness="2")]),
    )
    frames = [
        _item(PlanePositionSequence=Items([_item(ImagePositionPatient=[0, 0, float(depth)])]))
        for depth in depths_mm
    ]
    if directions is not None:
        del shared.PlaneOrientationSequence
        _turn(frames, directions, depths_mm)
    if intercepts is None:
        shared.PixelValueTransformationSequence = _rescale(-1024.0)
    else:
        for frame, low in zip(frames, intercepts, strict=True):
            frame.PixelValueTransformationSequence = _rescale(low)
    dataset.SharedFunctionalGroupsSequence = Items([shared])
    dataset.PerFrameFunctionalGroupsSequence = Items(frames)
    dataset.update(values)
    dataset.save_as(path, enforce_file_format=True)
    return path


def _item(**values: object) -> Any:
    from pydicom.dataset import Dataset

    made = Dataset()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def _rescale(intercept: float) -> list[Any]:
    return [_item(RescaleSlope="1", RescaleIntercept=str(intercept), RescaleType="HU")]


def _turn(
    frames: list[Any], directions: npt.NDArray[np.float64], depths_mm: Sequence[float]
) -> None:
    from pydicom.sequence import Sequence as Items

    for frame, depth in zip(frames, depths_mm, strict=True):
        position = [f"{value:.6f}" for value in directions[:, 2] * depth]
        cosines = [f"{value:.10f}" for value in directions[:, :2].T.ravel()]
        frame.PlanePositionSequence[0].ImagePositionPatient = position
        frame.PlaneOrientationSequence = Items([_item(ImageOrientationPatient=cosines)])


def edit(path: Path, **values: object) -> None:
    """Set elements of a file, or remove those that are None."""
    from pydicom import dcmread

    dataset = dcmread(path)
    for name, value in values.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.save_as(path)


def ct_slice(stored: npt.NDArray[Any], intercept: float) -> Any:
    """A CT image as a data set without a place.

    Args:
        stored: ([D,] H, W) whole numbers of at most 16 bits, unsigned.
        intercept: rescale intercept.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, generate_uid

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(EXPLICIT_LITTLE_ENDIAN)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UID(CT_IMAGE_STORAGE)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Modality = "CT"
    dataset.PatientName, dataset.PatientID = "Synthetic", "0"
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 0
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", f"{intercept:g}"
    dataset.PixelData = np.ascontiguousarray(stored, np.uint16).tobytes()
    return dataset
