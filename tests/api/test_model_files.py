"""Which volume of a file and which series of a folder a model is asked about."""

import numpy as np
import pytest
from support.dicom_series import write_dicom_series

import dbsam_deploy as db
from dbsam_deploy.core.errors import InputError

BOXES = [[5, 6, 40, 30]]


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (50, 66, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tiny_artefact) -> db.Model:
    return db.load(tiny_artefact.folder)


def test_one_volume_of_a_4d_nifti(model, image, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    grey = image[..., 0].astype(np.int16)
    stored = np.stack([255 - grey, grey], axis=-1).transpose(1, 0, 2)[:, :, None, :]
    path = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), path)
    with pytest.raises(InputError, match="holds 2 volumes"):
        model.predict(path, boxes=BOXES)
    for volume in (0, 1):
        read = db.read_image(path, volume=volume)
        expected = model.predict(read, boxes=BOXES)
        result = model.predict(path, boxes=BOXES, volume=volume)
        np.testing.assert_array_equal(result.image.pixels, read.pixels)
        np.testing.assert_array_equal(result.masks, expected.masks)
        np.testing.assert_array_equal(
            model.segment(path, boxes=BOXES, volume=volume).labels, expected.labels
        )
        model.set_image(path, volume=volume)
        np.testing.assert_array_equal(model.predict(boxes=BOXES).masks, expected.masks)
        with pytest.raises(InputError, match="volume goes with an image"):
            model.predict(boxes=BOXES, volume=volume)
    assert db.read_image(path, volume=0).pixels.sum() != db.read_image(path, volume=1).pixels.sum()


def test_one_series_of_a_folder(model, tmp_path, rng):
    slices = rng.integers(0, 900, (2, 1, 50, 66)).astype(np.int16)
    for number in (0, 1):
        write_dicom_series(tmp_path / "both" / str(number), slices[number], SeriesNumber=number + 4)
    with pytest.raises(InputError, match="holds 2 DICOM series"):
        model.predict(tmp_path / "both", boxes=BOXES)
    result = model.predict(tmp_path / "both", boxes=BOXES, series=5)
    expected = model.predict(tmp_path / "both" / "1", boxes=BOXES)
    np.testing.assert_array_equal(result.image.pixels, expected.image.pixels)
