"""Grids of DICOM series: what rounding explains is removed, what it does not is refused."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.dicom_series import edit, rotation, write_dicom_series, write_enhanced

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.dicom import read_dicom
from dbsam_deploy.images.scans import Scan, nifti_bytes

pytest.importorskip("nibabel")
pytest.importorskip("pydicom")
sitk = pytest.importorskip("SimpleITK")

TILT = rotation(-15, 0, 0)


def opened_by_itk(scan: Scan, folder: Path) -> "sitk.Image":
    """The label map of a scan as ITK reads it."""
    assert scan.geometry is not None
    labels = (np.arange(scan.values.size).reshape(scan.values.shape) % 7).astype(np.uint8)
    path = folder / "labels.nii"
    path.write_bytes(nifti_bytes(labels, scan.geometry, compressed=False))
    image = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), labels)
    return image


@pytest.mark.parametrize("digits", [2, 3, 4, 6])
@pytest.mark.parametrize("angles", [(12, -23, 31), (60, 40, -75), (170, 8, 93)])
def test_rounded_directions_open_in_itk(
    tmp_path: Path, digits: int, angles: tuple[float, float, float]
) -> None:
    volume = np.zeros((5, 6, 8), int)
    axes = rotation(*angles)
    write_dicom_series(tmp_path / "ct", volume, directions=axes, digits=(4, digits))
    image = opened_by_itk(read_dicom(tmp_path / "ct"), tmp_path)
    found = np.array(image.GetDirection()).reshape(3, 3)
    np.testing.assert_allclose(found, axes, atol=10.0**-digits)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(image.GetOrigin(), (-100, -80, 30), atol=1e-4)
    np.testing.assert_allclose(image.GetSpacing(), (0.8, 0.7, 2.5), atol=1e-4)


@pytest.mark.parametrize("count", [2, 3, 12, 60])
@pytest.mark.parametrize("step_mm", [0.625, 1.25, 3.27])
@pytest.mark.parametrize("angles", [(0, 0, 0), (20, -30, 40)])
def test_positions_of_one_decimal_are_one_even_stack(
    tmp_path: Path, count: int, step_mm: float, angles: tuple[float, float, float]
) -> None:
    write_dicom_series(
        tmp_path / "ct",
        np.zeros((count, 2, 2), int),
        spacing_mm=(step_mm, 0.7, 0.8),
        directions=rotation(*angles),
        digits=(1, 10),
    )
    scan = read_dicom(tmp_path / "ct")
    assert len(scan.values) == count
    assert scan.spacing_mm == pytest.approx((step_mm, 0.7, 0.8))
    opened_by_itk(scan, tmp_path)


def test_the_step_is_measured_where_nothing_states_it(tmp_path: Path) -> None:
    files = write_dicom_series(tmp_path / "ct", np.zeros((9, 2, 2), int), spacing_mm=(3, 1, 1))
    for file in files:
        edit(file, SliceThickness="5", SpacingBetweenSlices="4")
    assert read_dicom(tmp_path / "ct").spacing_mm == pytest.approx((3, 1, 1))


@pytest.mark.parametrize(("angle", "digits"), [(15, 10), (-7, 3), (2, 4), (0.5, 8)])
def test_a_tilted_gantry_forms_no_grid(tmp_path: Path, angle: float, digits: int) -> None:
    volume = np.arange(20 * 3 * 4).reshape(20, 3, 4)
    write_dicom_series(
        tmp_path / "ct",
        volume,
        directions=rotation(angle, 0, 0),
        step=(0, 0, 5),
        digits=(4, digits),
    )
    scan = read_dicom(tmp_path / "ct")
    np.testing.assert_array_equal(scan.values, volume)
    assert scan.geometry is None
    assert scan.unplaced == f"are sheared by {abs(angle):.1f}° (a tilted gantry)"
    assert scan.spacing_mm == pytest.approx((5 * np.cos(np.deg2rad(angle)), 0.7, 0.8), rel=1e-3)


def test_rows_and_columns_at_another_angle_form_no_grid(tmp_path: Path) -> None:
    axes = np.eye(3)
    axes[:, 1] = [np.sin(0.1), np.cos(0.1), 0]
    write_dicom_series(tmp_path / "ct", np.zeros((3, 3, 4), int), directions=axes)
    scan = read_dicom(tmp_path / "ct")
    assert scan.geometry is None
    assert "not at right angles" in scan.unplaced


@pytest.mark.parametrize("depths", [(0, 2, 4, 7, 9), (0, 1, 4, 9, 16), (0, 2, 4, 5, 6)])
def test_uneven_slices_are_read_in_order_without_a_grid(
    tmp_path: Path, depths: tuple[float, ...]
) -> None:
    volume = np.arange(5 * 3 * 4).reshape(5, 3, 4)
    files = write_dicom_series(tmp_path / "ct", volume)
    for file, depth in zip(files, depths, strict=True):
        edit(file, ImagePositionPatient=[0, 0, depth])
    scan = read_dicom(tmp_path / "ct")
    np.testing.assert_array_equal(scan.values, volume)
    assert scan.geometry is None
    assert scan.spacing_mm is None
    assert scan.unplaced.startswith("lie unevenly")
    assert scan.unplaced in scan.notes[0]


def test_a_slice_beside_the_others_forms_no_grid(tmp_path: Path) -> None:
    files = write_dicom_series(tmp_path / "ct", np.zeros((5, 3, 4), int))
    edit(files[2], ImagePositionPatient=[-97, -80, 35])
    assert "straight line" in read_dicom(tmp_path / "ct").unplaced


@pytest.mark.parametrize("lost", [(2,), (1, 2, 3), (1, 4)])
@pytest.mark.parametrize("digits", [1, 6])
def test_missing_slices_are_refused(tmp_path: Path, lost: tuple[int, ...], digits: int) -> None:
    files = write_dicom_series(
        tmp_path / "ct", np.zeros((9, 2, 2), int), spacing_mm=(0.625, 1, 1), digits=(digits, 10)
    )
    for index in lost:
        files[index].unlink()
    with pytest.raises(InputError, match="missing there"):
        read_dicom(tmp_path / "ct")


def test_a_gap_between_slices_with_numbers_in_a_row_is_uneven_and_not_missing(
    tmp_path: Path,
) -> None:
    files = write_dicom_series(tmp_path / "ct", np.zeros((9, 2, 2), int))
    files[4].unlink()
    for number, file in enumerate(files[:4] + files[5:], 1):
        edit(file, InstanceNumber=number)
    scan = read_dicom(tmp_path / "ct")
    assert (len(scan.values), scan.geometry) == (8, None)
    assert "lie unevenly, 2.5 to 5 mm apart" in scan.unplaced


def test_missing_slices_are_refused_without_numbers(tmp_path: Path) -> None:
    files = write_dicom_series(tmp_path / "ct", np.zeros((9, 2, 2), int))
    files[4].unlink()
    for file in files[:4] + files[5:]:
        edit(file, InstanceNumber=None)
    with pytest.raises(InputError, match="1 missing there"):
        read_dicom(tmp_path / "ct")


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_slice_stored_twice_is_refused(tmp_path: Path, count: int) -> None:
    files = write_dicom_series(tmp_path / "ct", np.zeros((count, 2, 2), int))
    shutil.copy(files[1], tmp_path / "ct" / "copy.dcm")
    with pytest.raises(InputError, match=r"copy\.dcm.*stored twice"):
        read_dicom(tmp_path / "ct")


def test_frames_of_two_echoes_are_refused(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "e.dcm", np.zeros((4, 2, 2), int), depths_mm=(0, 2, 0, 2))
    with pytest.raises(InputError, match=r"e\.dcm \(frames 0 and 2\) lie at one place"):
        read_dicom(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "orientation or PixelSpacing"),
        ({"ImageOrientationPatient": [2, 0, 0, 0, 2, 0]}, "orientation or PixelSpacing"),
        ({"PixelSpacing": ["0", "1"]}, "more than 0 mm"),
        ({"PixelSpacing": None}, "orientation or PixelSpacing"),
        ({"ImagePositionPatient": [1, 2]}, "expected 3 finite numbers"),
    ],
)
def test_geometry_that_is_none_is_refused(
    tmp_path: Path, values: dict[str, object], message: str
) -> None:
    (file,) = write_dicom_series(tmp_path / "ct", np.zeros((1, 2, 2), int))
    edit(file, **values)
    with pytest.raises(InputError, match=message):
        read_dicom(file)


def test_gzip_and_plain_label_maps_are_equal(tmp_path: Path) -> None:
    write_dicom_series(tmp_path / "ct", np.zeros((3, 3, 4), int))
    scan = read_dicom(tmp_path / "ct")
    labels = np.ones(scan.values.shape, np.uint8)
    packed = nifti_bytes(labels, scan.geometry)
    assert gzip.decompress(packed) == nifti_bytes(labels, scan.geometry, compressed=False)
