"""Every format puts an object where it is in the patient, whatever the directions of its slices.

The object is drawn into the pixels, found again by its brightness in what was read, written, and
opened by readers that share no code with the writers.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.dicom_series import edit, rotation, write_dicom_series, write_enhanced
from support.physical import (
    POINTS,
    by_frames,
    by_highdicom,
    by_polygons,
    by_rt_utils,
    by_simpleitk,
    same_points,
)

from dbsam_deploy.images.volumes import read_image
from dbsam_deploy.outputs.files import planned, write
from dbsam_deploy.outputs.segmentation import Segmentation, SegmentedObject

pytest.importorskip("highdicom")

ORIGIN, SPACING = (-100.0, -80.0, 30.0), (2.5, 0.7, 0.8)
IDS = {
    "FrameOfReferenceUID": "1.2.826.0.1.3680043.8.498.1",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.2",
    "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.3",
}


@dataclass(frozen=True)
class Case:
    """Directions of x, y and z as columns, and the step from slice to slice where it is not z."""

    directions: np.ndarray
    step: tuple[float, float, float] | None = None


def turned(x: tuple[int, int, int], y: tuple[int, int, int]) -> np.ndarray:
    return np.column_stack([x, y, np.cross(x, y)]).astype(float)


GRIDS = {
    "axial": Case(np.eye(3)),
    "coronal": Case(turned((1, 0, 0), (0, 0, -1))),
    "sagittal": Case(turned((0, 1, 0), (0, 0, -1))),
    "oblique": Case(rotation(20, -30, 40)),
    "left-handed": Case(np.eye(3), (0, 0, -2.5)),
    "oblique, left-handed": Case(rotation(20, -30, 40), tuple(rotation(20, -30, 40)[:, 2] * -2.5)),
    "feet first, mirrored": Case(turned((-1, 0, 0), (0, 1, 0))),
}
STACKS = GRIDS | {"tilted gantry": Case(np.eye(3), (0, 0.8, 2.4))}


def drawn(shape: tuple[int, int, int] = (6, 9, 16)) -> np.ndarray:
    """An object that no turn or mirror maps onto itself: three arms, a hole, a piece apart.

    GDCM, in SimpleITK, reads bits beyond the end of frames whose pixels fill no whole bytes.
    """
    inside = np.zeros(shape, bool)
    inside[1:4, 2:7, 3:8] = True
    inside[2, 3:6, 4:7] = False  # a hole
    inside[2, 4, 5] = True  # an island in it
    inside[4, 3, 3:10] = True
    inside[3, 8, 0] = True  # apart, at the edge of the image
    inside[0, 2, 3] = True
    return inside


def segmented(source: Path, inside: np.ndarray) -> Segmentation:
    image = read_image(source, window=(500, 1000))
    labels = (image.pixels > 128).astype(np.uint8)
    assert labels.sum() == inside.sum()
    return Segmentation(
        image,
        labels,
        (SegmentedObject(1, "left kidney"),),
        np.full((1, len(labels)), 0.9, np.float32),
        "toy",
        fractions=lambda label, z: np.where(labels[z] == label, 0.9, 0.1).astype(np.float32),
    )


def truth(inside: np.ndarray, case: Case, spacing: tuple[float, float, float] = SPACING) -> POINTS:
    z, y, x = np.nonzero(inside)
    axes = case.directions
    along = axes[:, 2] * spacing[0] if case.step is None else np.array(case.step)
    return (
        np.array(ORIGIN)
        + np.outer(z, along)
        + np.outer(y, axes[:, 1] * spacing[1])
        + np.outer(x, axes[:, 0] * spacing[2])
    )


@pytest.mark.parametrize("name", STACKS)
def test_an_object_stays_where_it_is(name: str, tmp_path: Path) -> None:
    case, inside = STACKS[name], drawn()
    files = write_dicom_series(
        tmp_path / "ct",
        inside * 1000,
        directions=case.directions,
        step=case.step,
        spacing_mm=SPACING,
        origin_mm=ORIGIN,
        **IDS,
    )
    segmentation, expected = segmented(tmp_path / "ct", inside), truth(inside, case)
    formats = ["dicom-seg", "dicom-seg-fractional", "rtstruct", *["nifti"] * (name in GRIDS)]
    paths = planned(segmentation.image, formats, tmp_path / "out")
    write(segmentation, paths)
    assert same_points(by_frames(paths["dicom-seg"]), expected)
    assert same_points(by_polygons(paths["rtstruct"], files), expected)
    if name in GRIDS:
        assert same_points(by_simpleitk(paths["nifti"]), expected)
        assert same_points(by_simpleitk(paths["dicom-seg"]), expected)
        assert same_points(by_highdicom(paths["dicom-seg"]), expected)
        assert same_points(by_simpleitk(paths["dicom-seg-fractional"]), expected)


def test_uneven_slices_keep_their_own_places(tmp_path: Path) -> None:
    inside, case = drawn(), Case(rotation(20, -30, 40))
    files = write_dicom_series(
        tmp_path / "ct", inside * 1000, directions=case.directions, origin_mm=ORIGIN, **IDS
    )
    beyond = np.array([0, 0, 0, 0.9, 0, 1.7])  # mm along the normal
    for index, path in enumerate(files):
        depth = 2.5 * index + beyond[index]
        position = np.array(ORIGIN) + case.directions[:, 2] * depth
        edit(path, ImagePositionPatient=[f"{value:.6f}" for value in position])
    segmentation = segmented(tmp_path / "ct", inside)
    assert "unevenly" in segmentation.image.unplaced
    expected = truth(inside, case) + np.outer(beyond[np.nonzero(inside)[0]], case.directions[:, 2])
    paths = planned(segmentation.image, ["dicom-seg", "rtstruct"], tmp_path)
    write(segmentation, paths)
    assert same_points(by_frames(paths["dicom-seg"]), expected)
    assert same_points(by_polygons(paths["rtstruct"], files), expected)


@pytest.mark.parametrize("name", ["shared directions", "each frame its own"])
def test_an_enhanced_image_whose_frames_are_in_another_order(name: str, tmp_path: Path) -> None:
    inside, turn = drawn(), rotation(20, -30, 40) if name.startswith("each") else np.eye(3)
    order = [3, 0, 5, 1, 4, 2]
    path = write_enhanced(
        tmp_path / "a.dcm",
        inside[order] * 1000,
        depths_mm=[2.0 * z for z in order],
        directions=turn if name.startswith("each") else None,
        **IDS,
    )
    segmentation = segmented(path, inside)
    z, y, x = np.nonzero(inside)
    expected = (
        np.outer(z * 2.0, turn[:, 2])
        + np.outer(y * 0.8, turn[:, 1])
        + np.outer(x * 0.7, turn[:, 0])
    )
    paths = planned(segmentation.image, ["nifti", "dicom-seg", "rtstruct"], tmp_path)
    write(segmentation, paths)
    assert same_points(by_simpleitk(paths["nifti"]), expected)
    assert same_points(by_simpleitk(paths["dicom-seg"]), expected)
    assert same_points(by_frames(paths["dicom-seg"]), expected)
    assert same_points(by_polygons(paths["rtstruct"], [path]), expected)


@pytest.mark.parametrize("name", GRIDS)
def test_rt_utils_reads_the_same_voxels(name: str, tmp_path: Path) -> None:
    """It rounds contours to whole pixels."""
    pytest.importorskip("rt_utils", exc_type=ImportError)
    case, inside = GRIDS[name], drawn((6, 12, 12))
    write_dicom_series(
        tmp_path / "ct",
        inside * 1000,
        directions=case.directions,
        step=case.step,
        spacing_mm=(2.5, 0.8, 0.8),
        **IDS,
    )
    segmentation = segmented(tmp_path / "ct", inside)
    paths = planned(segmentation.image, ["rtstruct"], tmp_path)
    write(segmentation, paths)
    read = by_rt_utils(paths["rtstruct"], tmp_path / "ct", "left kidney")
    assert np.array_equal(read, inside[::-1] if case.step else inside)


@pytest.mark.parametrize("flip", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
def test_a_nifti_of_either_handedness_gets_its_own_grid_back(
    flip: tuple[int, int, int], tmp_path: Path
) -> None:
    nibabel = pytest.importorskip("nibabel")
    inside = drawn()
    affine = np.eye(4)
    affine[:3, :3] = rotation(20, -30, 40) @ np.diag(np.array(flip) * SPACING[::-1])
    affine[:3, 3] = 11, -7, 5
    array = (inside * 1000).transpose(2, 1, 0).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / "a.nii.gz")
    segmentation = segmented(tmp_path / "a.nii.gz", inside)
    paths = planned(segmentation.image, ["nifti"], tmp_path)
    write(segmentation, paths)
    x, y, z = np.nonzero(array)
    right = np.stack([x, y, z], 1) @ affine[:3, :3].T + affine[:3, 3]
    assert same_points(by_simpleitk(paths["nifti"]), right * (-1, -1, 1))
