"""Voxels and millimetres against nibabel and ITK; anatomical planes of any acquisition."""

from pathlib import Path

import numpy as np
import pytest
from support.dicom_series import rotation, write_dicom_series

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.intensity import STORED
from dbsam_deploy.images.scans import ScanGeometry
from dbsam_deploy.images.volumes import Volume, read_image
from dbsam_deploy.volumes.frames import plane_axis, to_patient, to_voxels

SHAPE = (5, 6, 7)
CENTRES = np.array([[0, 0, 0], [6, 5, 4], [2.25, 3.5, 1.0]])
"""x, y, z as indices of voxels."""
ACQUIRED = {  # columns: the patient directions (left, posterior, superior) of x, y and z
    "axial": np.eye(3),
    "coronal": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], float),
    "sagittal": np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]], float),
    "oblique": rotation(25, -15, 10),
    "steep": rotation(35, 30, -40),
}


def placed(affine: np.ndarray, shape: tuple[int, int, int] = SHAPE) -> Volume:
    pixels = np.zeros(shape, np.uint8)
    return Volume(
        Path("scan.nii"),
        "nifti",
        pixels,
        STORED,
        spacing_mm=(1.0, 1.0, 1.0),
        geometry=ScanGeometry(affine, shape[::-1]),
    )


def affine_of(directions: np.ndarray) -> np.ndarray:
    """Voxels of 0.8, 0.7 and 2.5 mm along x, y and z; the directions are of DICOM's frame."""
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ directions @ np.diag([0.8, 0.7, 2.5])
    affine[:3, 3] = [11.5, -40.25, 300]
    return affine


@pytest.mark.parametrize("directions", ACQUIRED.values(), ids=ACQUIRED)
@pytest.mark.parametrize("mirrored", [False, True], ids=["right-handed", "left-handed"])
def test_places_in_nifti_are_nibabels(directions, mirrored, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    affine = affine_of(directions @ np.diag([-1, 1, 1]) if mirrored else directions)
    values = np.random.default_rng(0).integers(0, 99, SHAPE[::-1], np.uint8)
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "ct.nii")
    volume = read_image(tmp_path / "ct.nii")
    ras = nibabel.affines.apply_affine(nibabel.load(tmp_path / "ct.nii").affine, CENTRES)
    np.testing.assert_allclose(to_voxels(ras, volume, "ras"), CENTRES + 0.5, atol=2e-5)
    np.testing.assert_allclose(
        to_voxels(ras * (-1, -1, 1), volume, "lps"), CENTRES + 0.5, atol=2e-5
    )
    np.testing.assert_allclose(to_patient(CENTRES + 0.5, volume, "ras"), ras, atol=1e-9)


@pytest.mark.parametrize("directions", ACQUIRED.values(), ids=ACQUIRED)
def test_places_in_dicom_are_itks(directions, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    values = np.random.default_rng(0).integers(0, 99, SHAPE)
    files = write_dicom_series(tmp_path / "ct", values, directions=directions)
    image = sitk.ReadImage([str(file) for file in files])
    volume = read_image(tmp_path / "ct")
    lps = [image.TransformContinuousIndexToPhysicalPoint(centre) for centre in CENTRES.tolist()]
    np.testing.assert_allclose(to_voxels(lps, volume), CENTRES + 0.5, atol=1e-4)
    np.testing.assert_allclose(to_patient(CENTRES + 0.5, volume), lps, atol=1e-4)


@pytest.mark.parametrize(
    ("acquired", "axes"),
    [
        ("axial", {"axial": 0, "coronal": 1, "sagittal": 2}),
        ("coronal", {"coronal": 0, "axial": 1, "sagittal": 2}),
        ("sagittal", {"sagittal": 0, "axial": 1, "coronal": 2}),
        ("oblique", {"axial": 0, "coronal": 1, "sagittal": 2}),
    ],
)
def test_anatomical_planes_of_any_acquisition(acquired, axes):
    volume = placed(affine_of(ACQUIRED[acquired]))
    assert {plane: plane_axis(volume, plane) for plane in axes} == axes
    assert plane_axis(volume, "stored") == 0


def test_each_axis_has_one_plane_even_where_two_are_near():
    # Two patient axes are nearest to the same voxel axis; each plane still has its own.
    for angles in ((0, 5, 45), (0, 20, 45), (5, 5, 45)):
        along = np.abs(rotation(*angles))
        volume = placed(affine_of(rotation(*angles)))
        axes = {plane_axis(volume, plane) for plane in ("axial", "coronal", "sagittal")}
        assert axes == {0, 1, 2}
        if angles == (0, 5, 45):
            assert len(set(along.argmax(1).tolist())) < 3


def test_rounded_millimetres_on_the_border_count_as_inside():
    volume = placed(affine_of(ACQUIRED["oblique"]))
    rounded = to_patient([[7.004, 6, 5.008], [-0.003, 0, 2]], volume, "ras")
    assert to_voxels(rounded, volume, "ras").tolist() == [[7, 6, 5], [0, 0, 2]]
    outside = to_voxels(to_patient([7.02, 6, 5], volume, "ras"), volume, "ras")
    np.testing.assert_allclose(outside, [7.02, 6, 5], atol=1e-6)


def test_millimetres_of_a_volume_without_a_place_are_refused():
    volume = Volume(Path("a.npz"), "npz", np.zeros(SHAPE, np.uint8), STORED)
    with pytest.raises(InputError, match=r"a\.npz: it has no position in space.*give voxels"):
        to_voxels([[1, 2, 3]], volume, "ras")
    with pytest.raises(InputError, match="space 'mm'"):
        to_voxels([[1, 2, 3]], volume, "mm")  # type: ignore[arg-type]
    assert plane_axis(volume, "axial") == 0  # what such a file is taken for
    with pytest.raises(InputError, match="plane 'oblique'"):
        plane_axis(volume, "oblique")  # type: ignore[arg-type]


@pytest.mark.parametrize("places", [[[1, 2]], [[1, np.nan, 3]], "abc"])
def test_places_that_are_none(places):
    with pytest.raises(InputError, match="coordinates"):
        to_voxels(places, placed(np.eye(4)))


def test_a_single_image_has_no_slices_across():
    volume = placed(np.eye(4), (1, 6, 7))
    with pytest.raises(InputError, match="2D image, which has no coronal"):
        plane_axis(volume, "coronal")
