"""Which series of a folder is read, and what is set aside."""

from pathlib import Path

import numpy as np
import pytest
from support.dicom_series import edit, write_dicom_series, write_enhanced

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.dicom import read_dicom

pytest.importorskip("pydicom")

AXIAL = np.arange(5 * 4 * 6).reshape(5, 4, 6)


def write_two(folder: Path) -> None:
    """A thin and a thick series in folders of their own."""
    write_dicom_series(
        folder / "a", AXIAL, SeriesNumber=3, SeriesInstanceUID="1.2.3", SeriesDescription="thin"
    )
    write_dicom_series(
        folder / "b",
        AXIAL[:2] + 1,
        SeriesNumber=4,
        SeriesInstanceUID="1.2.4",
        SeriesDescription="thick\x1b[2J",
    )


def test_several_series_are_listed(tmp_path: Path) -> None:
    write_two(tmp_path)
    with pytest.raises(InputError, match="2 DICOM series: choose one with --series") as caught:
        read_dicom(tmp_path)
    assert caught.value.details == (
        "number 3 · CT, 5 files · 4×6 · thin · UID 1.2.3",
        "number 4 · CT, 2 files · 4×6 · thick[2J · UID 1.2.4",
    )


def test_a_series_that_says_nothing_of_itself_is_listed_too(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (file,) = write_dicom_series(tmp_path / name, AXIAL[:1], SeriesInstanceUID="1.2.5")
    edit(file, SeriesInstanceUID=None, Modality=None)
    with pytest.raises(InputError, match="2 DICOM series") as caught:
        read_dicom(tmp_path)
    assert caught.value.details == (
        "number – · no modality, 1 file · 4×6 · no description · UID missing",
        "number – · CT, 1 file · 4×6 · no description · UID 1.2.5",
    )


@pytest.mark.parametrize("name", ["4", "1.2.4"])
def test_a_series_is_chosen_by_number_or_uid(tmp_path: Path, name: str) -> None:
    write_two(tmp_path)
    np.testing.assert_array_equal(read_dicom(tmp_path, series=name).values, AXIAL[:2] + 1)


def test_an_unknown_series_is_refused_with_the_table(tmp_path: Path) -> None:
    write_two(tmp_path)
    with pytest.raises(InputError, match="no series has the UID or number '5'") as caught:
        read_dicom(tmp_path, series="5")
    assert len(caught.value.details) == 2


def test_a_number_of_two_series_is_refused(tmp_path: Path) -> None:
    write_dicom_series(tmp_path / "a", AXIAL, SeriesNumber=3)
    write_dicom_series(tmp_path / "b", AXIAL, SeriesNumber=3)
    with pytest.raises(InputError, match="2 series have the number '3'"):
        read_dicom(tmp_path, series="3")


@pytest.mark.parametrize("own_series", [True, False])
@pytest.mark.parametrize(
    ("types", "kind"),
    [
        (["ORIGINAL", "PRIMARY", "LOCALIZER"], "localizer"),
        ("LOCALIZER", "localizer"),  # one value is no list
        (["DERIVED", "SECONDARY"], "derived image"),
        (["DERIVED", "SECONDARY", "SCREEN SAVE"], "secondary capture"),
    ],
)
def test_an_image_of_another_kind_is_set_aside(
    tmp_path: Path, types: list[str] | str, kind: str, own_series: bool
) -> None:
    write_dicom_series(
        tmp_path / "ct", AXIAL, ImageType=["ORIGINAL", "PRIMARY", "AXIAL"], SeriesInstanceUID="1.2"
    )
    (other,) = write_dicom_series(
        tmp_path / "other",
        np.zeros((1, 9, 9), int),
        ImageType=types,
        SeriesInstanceUID="1.3" if own_series else "1.2",
    )
    scan = read_dicom(tmp_path)
    np.testing.assert_array_equal(scan.values, AXIAL)
    assert scan.notes == (f"{kind} set aside, as its ImageType says: {other.name}",)


def test_a_secondary_capture_is_known_by_its_class(tmp_path: Path) -> None:
    write_dicom_series(tmp_path / "ct", AXIAL)
    (other,) = write_dicom_series(tmp_path / "other", np.zeros((1, 9, 9), int))
    edit(other, SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
    assert "secondary capture" in read_dicom(tmp_path).notes[0]


def test_a_localizer_alone_is_read(tmp_path: Path) -> None:
    (file,) = write_dicom_series(
        tmp_path / "ct", AXIAL[:1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )
    assert len(read_dicom(file.parent).values) == len(read_dicom(file).values) == 1


def test_a_reformatted_volume_is_a_series_to_choose(tmp_path: Path) -> None:
    write_dicom_series(tmp_path / "a", AXIAL)
    write_dicom_series(
        tmp_path / "b", AXIAL + 7, ImageType=["DERIVED", "SECONDARY", "MPR"], SeriesNumber=9
    )
    with pytest.raises(InputError, match="2 DICOM series"):
        read_dicom(tmp_path)
    np.testing.assert_array_equal(read_dicom(tmp_path, series="9").values, AXIAL + 7)


def test_derived_images_without_a_place_are_no_volume(tmp_path: Path) -> None:
    """Three and more with a place are one, see above."""
    write_dicom_series(tmp_path / "a", AXIAL)
    for file in write_dicom_series(
        tmp_path / "b", AXIAL[:4] + 7, ImageType=["DERIVED", "SECONDARY"], SeriesNumber=9
    ):
        edit(file, ImagePositionPatient=None)
    scan = read_dicom(tmp_path)
    np.testing.assert_array_equal(scan.values, AXIAL)
    (note,) = scan.notes
    assert note.startswith("derived image set aside, as its ImageType says: ")
    assert note.endswith(" and 1 more")


def test_derived_files_whose_frames_have_places_are_a_series_to_choose(tmp_path: Path) -> None:
    write_dicom_series(tmp_path / "a", AXIAL)
    for index in range(3):
        file = write_enhanced(tmp_path / f"{index}.dcm", AXIAL[:2], depths_mm=[0, 2])
        edit(file, ImageType=["DERIVED", "SECONDARY"], SeriesInstanceUID="1.2.6")
    with pytest.raises(InputError, match="2 DICOM series"):
        read_dicom(tmp_path)


def test_reports_alone_are_no_image(tmp_path: Path) -> None:
    for file in write_dicom_series(tmp_path / "ct", AXIAL[:3]):
        edit(file, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", PixelData=None)
        names = ", ".join(sorted(path.name for path in file.parent.iterdir()))
    with pytest.raises(InputError) as refused:
        read_dicom(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path}: no image among its DICOM files (passed over, since they are no images (Basic "
        f"Text SR Storage): {names})"
    )
