"""Slices of one file, from its top level or its functional groups."""

from pathlib import Path

import numpy as np
import pytest
from support.dicom_series import edit, write_dicom_series, write_enhanced

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.dicom import read_dicom
from dbsam_deploy.images.dicom_files import read_header
from dbsam_deploy.images.dicom_frames import frames_of
from dbsam_deploy.images.volumes import read_image

pydicom = pytest.importorskip("pydicom")


def test_a_plain_file_is_one_frame(tmp_path: Path) -> None:
    files = write_dicom_series(tmp_path, np.zeros((2, 3, 4), int), digits=(2, 4))
    (frame,) = frames_of(read_header(files[1]))
    assert frame.position.tolist() == [-100, -80, 32.5]
    assert frame.orientation.tolist() == [1, 0, 0, 0, 1, 0]
    assert frame.pixel_spacing.tolist() == [0.7, 0.8]
    assert (frame.thickness, frame.gap, frame.number, frame.index) == (2.5, 0, 2, 0)
    assert frame.decimals == (1, 0)  # -100.00, 32.50: as many as they need


def test_frames_keep_their_order_and_share(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "e.dcm", np.zeros((3, 3, 4), int), depths_mm=(4, 0, 2))
    frames = frames_of(read_header(path))
    assert [frame.position[2] for frame in frames] == [4, 0, 2]
    assert [frame.index for frame in frames] == [0, 1, 2]
    assert {frame.thickness for frame in frames} == {2.0}
    assert {float(frame.values.RescaleIntercept) for frame in frames} == {-1024.0}
    assert {frame.number for frame in frames} == {None}


def test_an_enhanced_mr(tmp_path: Path) -> None:
    """No HU and no unit of its own: by percentiles; a second echo at the same places is said."""
    volume = np.arange(4 * 5 * 6).reshape(4, 5, 6) * 3
    path = tmp_path / "mr.dcm"
    write_enhanced(path, volume, depths_mm=(6, 0, 3, 9), intercepts=[0] * 4)
    edit(path, SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1", Modality="MR")
    scan = read_dicom(path)
    np.testing.assert_array_equal(scan.values, volume[[1, 2, 0, 3]])
    np.testing.assert_allclose(scan.spacing_mm, (3, 0.8, 0.7))
    assert not scan.is_ct
    image = read_image(path)
    assert image.intensity.how == "percentiles"
    np.testing.assert_allclose(image.geometry.affine[:3, 3], 0, atol=1e-9)
    write_enhanced(path, volume, depths_mm=(0, 3, 0, 3), intercepts=[0] * 4)
    edit(path, SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1", Modality="MR")
    with pytest.raises(InputError, match="twice"):
        read_dicom(path)


def test_frames_and_descriptions_must_agree(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "e.dcm", np.zeros((3, 3, 4), int), depths_mm=(4, 0, 2))
    edit(path, NumberOfFrames=4)
    with pytest.raises(InputError, match="4 frames, but 3 descriptions"):
        frames_of(read_header(path))


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    (file,) = write_dicom_series(tmp_path, np.zeros((1, 3, 4), int))
    content = file.read_bytes()
    file.write_bytes(content.replace(b"-80.000000", b"nan       "))
    with pytest.raises(InputError, match="expected 3 finite numbers"):
        frames_of(read_header(file))
