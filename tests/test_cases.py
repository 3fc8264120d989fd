"""Awkward files of a folder beside this repository, each as the README there demands."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest

import dbsam_deploy as db
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.dicom import read_dicom
from dbsam_deploy.images.volumes import label_map_bytes, read_image

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="no folder shared/cases beside it")


def disc(shape: tuple[int, int], row: int = 20, column: int = 30) -> np.ndarray:
    rows, columns = np.indices(shape)
    return (rows - row) ** 2 + (columns - column) ** 2 <= 8**2


def opened_in_itk(name: str, tmp_path: Path):
    """The label map of a case as ITK opens it."""
    sitk = pytest.importorskip("SimpleITK")
    volume = read_image(CASES / name)
    labels = np.zeros(volume.shape, np.uint8)
    labels[:, disc(volume.shape[1:])] = 1
    path = tmp_path / "mask.nii.gz"
    path.write_bytes(label_map_bytes(labels, volume))
    image = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), labels)
    return image, volume


@pytest.fixture(scope="module")
def model() -> db.Model:
    """The shipped model, in PyTorch: no export is needed."""
    pytest.importorskip("torch")
    return db.load(backend="pytorch")


def test_padding_is_outside_the_range() -> None:
    name, truth = "pixel_padding_unsigned/a.dcm", disc((64, 64), 30, 34)
    image = read_image(CASES / name, window=None)
    assert image.intensity.excluded == 1095
    assert image.intensity.high < 1000
    assert image.pixels[0][truth].min() > 100
    assert image.pixels[0, 0, 0] == 0 == image.pixels.min()


def test_inversion_comes_after_the_files_own_window() -> None:
    name, truth = "mono1_window/dx.dcm", disc((64, 48))
    own, usual = read_image(CASES / name, window="file"), read_image(CASES / name)
    assert "level 800 width 400" in str(own.intensity)
    # The object has 700, a quarter of the window from 600 to 1000; what is above it is white.
    assert set(own.pixels[0][truth]) == {255 - 63}
    assert set(own.pixels[0][~truth]) == {0}
    assert set(usual.pixels[0][truth]) == {255}
    assert usual.pixels[0][~truth].max() < 30


@pytest.mark.slow  # one forward pass of the model takes seconds on a CPU
@pytest.mark.parametrize(
    ("name", "box", "row", "column", "bar"),
    [
        ("pixel_padding_unsigned/a.dcm", [24, 20, 45, 41], 30, 34, 0.94),
        ("mono1_window/dx.dcm", [20, 10, 41, 31], 20, 30, 0.95),
    ],
)
def test_the_mask_of_the_shipped_model(
    model: db.Model, name: str, box: list[int], row: int, column: int, bar: float
) -> None:
    result = model.predict(CASES / name, boxes=[box])
    mask = result.masks[0, 0]
    truth = disc(mask.shape, row, column)
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) >= bar


def test_an_enhanced_file_of_one_frame(tmp_path: Path) -> None:
    values = read_dicom(CASES / "enhanced/single.dcm").values[0]
    truth = disc(values.shape)
    assert (np.median(values[~truth]), np.median(values[truth])) == (-900, 100)
    image, volume = opened_in_itk("enhanced/single.dcm", tmp_path)
    np.testing.assert_allclose(image.GetSpacing(), (0.7, 0.8, 2), rtol=1e-6)
    assert volume.spacing_mm == (2, 0.8, 0.7)


def test_an_enhanced_file_of_four_frames(tmp_path: Path) -> None:
    image, volume = opened_in_itk("enhanced/multi.dcm", tmp_path)
    assert volume.shape == (4, 64, 48)
    np.testing.assert_allclose(image.GetSpacing(), (0.7, 0.8, 2), rtol=1e-6)
    for plane in volume.pixels:
        truth = disc(plane.shape)
        assert np.median(plane[truth]) > np.median(plane[~truth]) + 100


def test_an_empty_slice_is_named() -> None:
    with pytest.raises(InputError, match=r"5\.dcm is empty"):
        read_image(CASES / "empty_last_slice")


def test_a_tilted_gantry_is_segmented_and_gets_no_nifti() -> None:
    volume = read_image(CASES / "gantry_tilt")
    assert volume.shape == (5, 64, 48)
    with pytest.raises(InputError, match=r"sheared by 15\.0°.*which NIfTI needs"):
        label_map_bytes(np.zeros(volume.shape, np.uint8), volume)


def test_a_rounded_orientation_opens_on_its_own_grid(tmp_path: Path) -> None:
    image, volume = opened_in_itk("oblique_rounded/d3_0", tmp_path)
    directions = np.reshape(image.GetDirection(), (3, 3))
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(image.GetSpacing(), (0.45, 0.9, 1.25), rtol=1e-4)
    pydicom = pytest.importorskip("pydicom")
    positions = [
        pydicom.dcmread(path).ImagePositionPatient
        for path in sorted((CASES / "oblique_rounded/d3_0").glob("*.dcm"))
    ]
    ours = [image.TransformIndexToPhysicalPoint((0, 0, k)) for k in range(len(volume.pixels))]
    first = np.linalg.norm(np.array(positions, float)[:, None] - ours, axis=2)
    assert sorted(first.argmin(0)) == list(range(4))
    assert first.min(0).max() < 0.01


def test_rounded_positions_are_one_stack(tmp_path: Path) -> None:
    image, volume = opened_in_itk("rounded_positions", tmp_path)
    assert volume.shape[0] == 12
    np.testing.assert_allclose(image.GetSpacing()[2], 0.625, atol=0.01)


def test_a_file_without_suffix() -> None:
    volume = read_image(CASES / "no_suffix/IM000001")
    assert (volume.kind, volume.shape) == ("dicom", (1, 64, 48))


@pytest.mark.parametrize(
    ("name", "high"), [("nifti/two_values.nii.gz", 1000), ("pictures/binary16.png", 65535)]
)
def test_two_values_are_black_and_white(name: str, high: int) -> None:
    volume = read_image(CASES / name)
    assert (volume.intensity.low, volume.intensity.high) == (0, high)
    assert set(np.unique(volume.pixels)) == {0, 255}


def test_free_text_is_empty_in_every_output(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    source = CASES / "nifti/descrip_names_someone.nii.gz"
    before = nibabel.load(source).header
    named = [bytes(before[key]).strip(b"\0 ") for key in ("descrip", "aux_file", "db_name")]
    assert any(named)
    volume = read_image(source)
    labels = np.ones(volume.shape, np.uint8)
    for compressed in (False, True):
        content = label_map_bytes(labels, volume, compressed=compressed)
        content = gzip.decompress(content) if compressed else content
        header = nibabel.Nifti1Header.from_fileobj(io.BytesIO(content))
        for key in ("descrip", "aux_file", "db_name"):
            assert bytes(header[key]).strip(b"\0") == b""
        assert not any(text in content for text in named if text)


def test_a_photograph_is_upright() -> None:
    image_module = pytest.importorskip("PIL.Image")
    volume = read_image(CASES / "pictures/exif6.jpg")
    with image_module.open(CASES / "pictures/exif6.jpg") as stored:
        expected = np.rot90(np.asarray(stored.convert("RGB")), -1)
    np.testing.assert_array_equal(volume.slice_rgb(0), expected)
    assert "turned upright as its EXIF orientation 6 says" in str(volume.intensity)


def test_a_tiff() -> None:
    volume = read_image(CASES / "pictures/real.tif")
    assert volume.shape == (1, 60, 90)
    rows, columns = np.nonzero(volume.slice_rgb(0)[..., 0] > 100)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 29, 50, 79)
