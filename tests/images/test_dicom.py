"""A DICOM series as a scan: order, geometry, values, and damage that is refused."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from support.damage import refusals
from support.dicom_series import edit, rotation, write_dicom_series, write_enhanced

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.dicom import read_dicom
from dbsam_deploy.images.scans import nifti_bytes
from dbsam_deploy.images.volumes import label_map_bytes, png_bytes, read_image

nib = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")


@pytest.mark.parametrize("angles", [(0, 0, 0), (11, -17, 29), (0, 90, 0), (180, 0, 0)])
def test_series(
    tmp_path: Path, rng: np.random.Generator, angles: tuple[float, float, float]
) -> None:
    volume = rng.integers(-1000, 2000, (6, 5, 9)).astype(np.int32)
    directions = rotation(*angles)
    spacing, origin = (2.5, 0.7, 0.8), (-100.0, -80.0, 30.0)
    files = write_dicom_series(
        tmp_path / "ct", volume, directions=directions, spacing_mm=spacing, origin_mm=origin
    )
    assert sorted(files) != files  # names do not give the order away
    scan = read_dicom(tmp_path / "ct")
    np.testing.assert_array_equal(scan.values, volume)
    assert scan.spacing_mm == pytest.approx(spacing)
    assert scan.files == tuple(files)
    assert scan.is_ct
    # Each voxel's place in the patient, from the definition of the DICOM attributes.
    x, y, z = 7, 2, 4
    left_posterior = np.array(origin) + directions @ (np.array([x, y, z]) * spacing[::-1])
    right_anterior = left_posterior * [-1, -1, 1]
    np.testing.assert_allclose((scan.geometry.affine @ [x, y, z, 1])[:3], right_anterior, atol=1e-4)


def test_label_map_in_nifti(tmp_path: Path, rng: np.random.Generator) -> None:
    volume = rng.integers(-1000, 2000, (4, 5, 9)).astype(np.int32)
    write_dicom_series(tmp_path / "ct", volume, directions=rotation(10, 20, 30))
    scan = read_dicom(tmp_path / "ct")
    labels = rng.integers(0, 4, volume.shape).astype(np.uint8)
    content = nifti_bytes(labels, scan.geometry)
    back = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    np.testing.assert_allclose(back.affine, scan.geometry.affine, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(back.dataobj), labels.transpose(2, 1, 0))
    assert back.header.get_xyzt_units()[0] == "mm"


def test_a_single_file_is_one_slice(tmp_path: Path, rng: np.random.Generator) -> None:
    volume = rng.integers(-1000, 2000, (3, 5, 9)).astype(np.int32)
    files = write_dicom_series(tmp_path / "ct", volume)
    scan = read_dicom(files[1])
    np.testing.assert_array_equal(scan.values, volume[1:2])
    assert scan.spacing_mm == pytest.approx((2.5, 0.7, 0.8))


@pytest.mark.parametrize("intercepts", [None, (-1024.0, -900.0, -800.0, -950.0)])
def test_enhanced_frames_are_slices(
    tmp_path: Path, rng: np.random.Generator, intercepts: tuple[float, ...] | None
) -> None:
    """Rescale and place come from shared or per-frame groups, and frames are sorted by place."""
    volume = rng.integers(-700, 2000, (4, 5, 9)).astype(np.int32)
    path = write_enhanced(
        tmp_path / "ct.dcm", volume, depths_mm=(6, 2, 4, 8), intercepts=intercepts
    )
    scan = read_dicom(path)
    np.testing.assert_array_equal(scan.values, volume[[1, 2, 0, 3]])
    assert scan.spacing_mm == pytest.approx((2, 0.8, 0.7))
    np.testing.assert_allclose(scan.geometry.affine[:3, 3], [0, 0, 2])
    assert scan.is_ct


def test_one_enhanced_frame_has_hu_and_a_place(tmp_path: Path) -> None:
    volume = np.full((1, 4, 6), -900)
    scan = read_dicom(write_enhanced(tmp_path / "ct.dcm", volume, depths_mm=(7,)))
    assert (scan.values == -900).all()
    np.testing.assert_allclose(
        scan.geometry.affine, [[-0.7, 0, 0, 0], [0, -0.8, 0, 0], [0, 0, 2, 7], [0, 0, 0, 1]]
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"SeriesInstanceUID": "1.2.3"}, "2 DICOM series"),
        ({"PixelSpacing": ["0.7", "0.9"]}, "PixelSpacing differs"),
        ({"ImageOrientationPatient": [0, 1, 0, 1, 0, 0]}, "ImageOrientationPatient differs"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient is missing"),
        ({"ImageOrientationPatient": None}, "ImageOrientationPatient is missing"),
        ({"Rows": 4}, "Rows is 4, 5"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PhotometricInterpretation is"),
        ({"NumberOfFrames": 3}, "3 frames without a place"),
        ({"PixelData": b"\0\0"}, "cut short"),
        ({"PixelData": None}, "cut short"),
        ({"RescaleSlope": "0"}, "slope 0"),
        ({"Rows": None}, "Rows is 5, None"),
    ],
)
def test_a_series_that_is_no_stack_is_refused(
    tmp_path: Path, values: dict[str, object], message: str
) -> None:
    files = write_dicom_series(tmp_path / "ct", np.zeros((4, 5, 6), int))
    edit(files[2], **values)
    with pytest.raises(InputError, match=message):
        read_dicom(tmp_path / "ct")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "is not DICOM"),
        ("cut", "not readable DICOM|cut short"),
        ("empty folder", "no DICOM file"),
        ("index", "an index"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    (file,) = write_dicom_series(tmp_path / "ct", np.zeros((1, 5, 6), int))
    target = file
    if kind == "text":
        file.write_text("no DICOM")
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:300])
    elif kind == "index":
        edit(file, SOPClassUID="1.2.840.10008.1.3.10", PixelData=None)
    else:
        target = tmp_path / "empty"
        target.mkdir()
    with pytest.raises(InputError, match=message):
        read_dicom(target)


def test_flipped_bytes_never_escape_as_another_error(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Damage at random places is read or refused, never anything else."""
    (plain,) = write_dicom_series(tmp_path / "ct", np.zeros((1, 5, 6), int))
    enhanced = write_enhanced(tmp_path / "e.dcm", np.zeros((3, 4, 5), int), depths_mm=(0, 2, 4))
    found = [
        refusals(path, read_dicom, rng, times=120, below=path.stat().st_size)
        for path in (plain, enhanced)
    ]
    assert sum(found) > 30


def ct_series(folder: Path) -> Path:
    """Two slices with a disc of 100 HU on -900, in files without suffix."""
    rows, columns = np.ogrid[:64, :48]
    disc = (rows - 20) ** 2 + (columns - 30) ** 2 <= 64
    volume = np.stack([np.where(disc, 100, -900)] * 2)
    for file in write_dicom_series(folder, volume):
        file.rename(file.with_suffix(""))
    return folder


def test_ct_without_a_window_is_shown_by_the_soft_tissue_one(tmp_path: Path) -> None:
    volume = read_image(ct_series(tmp_path / "ct"))
    assert sorted(np.unique(volume.pixels)) == [0, int(260 / 400 * 255)]
    assert "soft-tissue window level 40 width 400 HU" in str(volume.intensity)
    assert "no window was given" in str(volume.intensity)
    assert (volume.intensity.low, volume.intensity.high) == (-160, 240)


def test_mr_without_a_window_is_shown_by_percentiles(tmp_path: Path) -> None:
    folder = ct_series(tmp_path / "mr")
    for file in folder.iterdir():
        edit(file, Modality="MR")
    assert read_image(folder).intensity.how != "window"


def test_padding_is_out_of_the_range_and_black(tmp_path: Path) -> None:
    stored = np.array([[[100, 200, 300, 63536]]])
    (file,) = write_dicom_series(
        tmp_path, stored, intercept=0, PixelPaddingValue=63536, Modality="MR"
    )
    volume = read_image(file)
    assert volume.pixels[0, 0, 3] == 0
    assert volume.pixels[0, 0, 2] == 255
    assert volume.intensity.excluded == 1


@pytest.mark.parametrize("window", [(800, 400), "file"])
def test_a_window_comes_before_the_inversion(tmp_path: Path, window: object) -> None:
    """MONOCHROME1: the window is of stored values, not of mirrored ones."""
    (file,) = write_dicom_series(
        tmp_path,
        np.array([[[700, 3100, 600]]]),
        intercept=0,
        PhotometricInterpretation="MONOCHROME1",
        Modality="DX",
        BitsStored=12,
        WindowCenter="800",
        WindowWidth="400",
    )
    pixels = read_image(file, window=window).pixels[0, 0]
    assert pixels[1:].tolist() == [0, 255]
    assert abs(int(pixels[0]) - 191) <= 1


def test_one_file_without_suffix_is_read(tmp_path: Path) -> None:
    folder = ct_series(tmp_path / "ct")
    assert read_image(next(folder.iterdir())).kind == "dicom"


def test_words_for_a_window_and_a_series_are_for_dicom(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes(np.eye(3, dtype=np.uint8)))
    with pytest.raises(InputError, match="no DICOM"):
        read_image(tmp_path / "a.png", window="file")
    with pytest.raises(InputError, match="no DICOM"):
        read_image(tmp_path / "a.png", series=3)
    with pytest.raises(InputError, match='or "file"'):
        read_image(ct_series(tmp_path / "ct"), window="lung")


def test_slices_without_a_grid_get_no_nifti(tmp_path: Path) -> None:
    write_dicom_series(tmp_path / "ct", np.arange(60).reshape(3, 4, 5), step=(0, 2, 5))
    volume = read_image(tmp_path / "ct", window=(30, 60))
    assert "sheared by 21.8°" in volume.notes[0]
    with pytest.raises(InputError, match=r"sheared by 21\.8° .*no straight grid.*npz"):
        label_map_bytes(np.zeros((3, 4, 5), np.uint8), volume)
