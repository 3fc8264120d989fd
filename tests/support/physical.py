"""Reads what was written with other programs' readers, as points in the patient.

Every reader returns (n, 3) mm left, posterior, superior: the centres of the voxels of one object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

POINTS = npt.NDArray[np.float64]


def by_simpleitk(path: Path, label: int = 1) -> POINTS:
    """A NIfTI label map, or a DICOM-SEG of one segment; of a fractional one what is above half."""
    import SimpleITK

    image = SimpleITK.ReadImage(str(path))
    array = SimpleITK.GetArrayFromImage(image)
    inside = array > 127 if array.max() > 1 and path.suffix == ".dcm" else array == label
    return np.array(
        [
            image.TransformIndexToPhysicalPoint([int(i) for i in zyx[::-1]])
            for zyx in np.argwhere(inside)
        ]
    ).reshape(-1, 3)


def by_highdicom(path: Path, label: int = 1) -> POINTS:
    """A segment of a DICOM-SEG on evenly spaced planes."""
    import highdicom

    volume = highdicom.seg.segread(path).get_volume(segment_numbers=[label])
    zyx = np.argwhere(volume.array[..., 0])
    return np.asarray(zyx @ volume.affine[:3, :3].T + volume.affine[:3, 3])


def by_frames(path: Path, label: int = 1) -> POINTS:
    """A segment of a DICOM-SEG, frame by frame, each where it says that it lies."""
    from pydicom import dcmread

    dataset = dcmread(path)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    row_mm, column_mm = np.array(shared.PixelMeasuresSequence[0].PixelSpacing, float)
    pixels = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    found: list[POINTS] = []
    for frame, plane in zip(dataset.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        named = frame if "SegmentIdentificationSequence" in frame else shared
        if named.SegmentIdentificationSequence[0].ReferencedSegmentNumber == label:
            position = frame.PlanePositionSequence[0].ImagePositionPatient
            found.append(_on_plane(plane > 0, position, cosines, (column_mm, row_mm)))
    return np.concatenate(found)


def by_polygons(path: Path, sources: list[Path], number: int = 1) -> POINTS:
    """A region of an RTSTRUCT: centres of the source's pixels inside an odd number of contours."""
    from matplotlib.path import Path as Polygon
    from pydicom import dcmread

    images = {str(each.SOPInstanceUID): each for each in map(dcmread, sources)}
    regions = {r.ReferencedROINumber: r for r in dcmread(path).ROIContourSequence}
    inside: dict[tuple[str, int], npt.NDArray[np.bool_]] = {}
    for contour in regions[number].get("ContourSequence", []):
        referenced = contour.ContourImageSequence[0]
        frame = int(referenced.get("ReferencedFrameNumber", 1)) - 1
        key = str(referenced.ReferencedSOPInstanceUID), frame
        position, cosines, steps, shape = _plane_of(images[key[0]], frame)
        points = np.array(contour.ContourData, float).reshape(-1, 3) - position
        normal = np.cross(cosines[:3], cosines[3:])
        assert np.abs(points @ normal).max() < 1e-3, "not on the plane that it names"
        polygon = np.stack([points @ cosines[:3] / steps[0], points @ cosines[3:] / steps[1]], 1)
        y, x = np.indices(shape)
        hit = Polygon(polygon).contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(shape)
        inside[key] = inside.get(key, np.zeros(shape, bool)) ^ hit
    found = []
    for (uid, frame), mask in inside.items():
        position, cosines, steps, _ = _plane_of(images[uid], frame)
        found.append(_on_plane(mask, position, cosines, steps))
    return np.concatenate(found) if found else np.zeros((0, 3))


def by_rt_utils(path: Path, folder: Path, name: str) -> npt.NDArray[np.bool_]:
    """(D, H, W) mask of a region. It can only read square images of square pixels."""
    from rt_utils import RTStructBuilder

    built = RTStructBuilder.create_from(str(folder), str(path))
    return np.asarray(built.get_roi_mask_by_name(name)).transpose(2, 0, 1)


def same_points(found: POINTS, expected: POINTS) -> bool:
    """Whether both are the same set of points, to a micrometre but for what decimals lose."""
    from scipy.spatial import cKDTree

    if len(found) != len(expected):
        return False
    distance, which = cKDTree(found).query(expected)
    return bool(distance.max() < 2e-3 and len(set(which)) == len(expected))


def _plane_of(
    image: Any, frame: int
) -> tuple[POINTS, POINTS, tuple[float, float], tuple[int, int]]:
    """Position, directions, steps along x and y, (H, W), of an image or one of its frames."""
    place = plane = measures = image
    if "PerFrameFunctionalGroupsSequence" in image:
        own = image.PerFrameFunctionalGroupsSequence[frame]
        shared = image.SharedFunctionalGroupsSequence[0]
        place = own.PlanePositionSequence[0]
        plane = (own if "PlaneOrientationSequence" in own else shared).PlaneOrientationSequence[0]
        measures = shared.PixelMeasuresSequence[0]
    row_mm, column_mm = (float(value) for value in measures.PixelSpacing)
    return (
        np.array(place.ImagePositionPatient, float),
        np.array(plane.ImageOrientationPatient, float),
        (column_mm, row_mm),
        (int(image.Rows), int(image.Columns)),
    )


def _on_plane(
    mask: npt.NDArray[np.bool_], position: Any, cosines: POINTS, steps: tuple[float, float]
) -> POINTS:
    y, x = np.nonzero(mask)
    along = np.outer(x * steps[0], cosines[:3]) + np.outer(y * steps[1], cosines[3:])
    return np.asarray(along + np.array(position, float))
