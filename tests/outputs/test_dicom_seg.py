"""DICOM-SEG and RTSTRUCT: what they say beside the pixels, and whom they refuse."""

import logging
import sys
import warnings
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.dicom_series import edit, write_dicom_series, write_enhanced
from support.physical import by_frames, by_polygons, same_points

from dbsam_deploy.core.errors import InputError, MissingError
from dbsam_deploy.images.volumes import read_image
from dbsam_deploy.outputs import dicom_seg, rtstruct
from dbsam_deploy.outputs.files import planned, write
from dbsam_deploy.outputs.segmentation import CodedTerm, Segmentation, SegmentedObject

pytest.importorskip("highdicom")
from pydicom import dcmread

IDS = {"FrameOfReferenceUID": "1.2.826.0.1.3680043.8.498.1"}
SHAPE = (4, 16, 16)


def segmented(source: Path, labels: np.ndarray, *objects: SegmentedObject) -> Segmentation:
    confidence = np.full((len(objects), len(labels)), 0.9, np.float32)
    image = read_image(source, window=(500, 1000))
    return Segmentation(image, labels, objects, confidence, "db_sam_tiny fp16")


@pytest.fixture
def series(tmp_path: Path) -> Path:
    write_dicom_series(tmp_path / "ct", np.arange(np.prod(SHAPE)).reshape(SHAPE) % 999, **IDS)
    return tmp_path / "ct"


def two(series: Path) -> Segmentation:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 2:8, 3:9] = 1
    labels[2, 10:12, 10:14] = 2
    return segmented(
        series,
        labels,
        SegmentedObject(1, "left kidney"),
        SegmentedObject(2, "Läsion\\αβγ " + "x" * 80, (255, 0, 0)),
    )


def dataset(content: bytes) -> Any:
    return dcmread(BytesIO(content))


def test_a_segment_says_what_it_is_and_who_made_it(series: Path) -> None:
    made = dataset(dicom_seg.binary_bytes(two(series)))
    kidney, lesion = made.SegmentSequence
    (term,) = kidney.SegmentedPropertyTypeCodeSequence
    assert (term.CodeValue, term.CodingSchemeDesignator) == ("64033007", "SCT")
    assert term.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert kidney.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "91723000"
    assert kidney.SegmentLabel == "left kidney"
    assert kidney.SegmentAlgorithmType == "SEMIAUTOMATIC"
    (algorithm,) = kidney.SegmentationAlgorithmIdentificationSequence
    assert algorithm.AlgorithmName == "db_sam_tiny fp16"
    assert kidney.TrackingUID != lesion.TrackingUID
    assert lesion.SegmentLabel == ("Läsion/αβγ " + "x" * 80)[:64]
    assert lesion.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"
    assert made.Modality == "SEG"
    assert made.SeriesDescription == "Segmentation by db_sam_tiny fp16"


def test_a_users_own_code_is_taken(series: Path) -> None:
    labels = np.ones(SHAPE, np.uint8)
    own = SegmentedObject(1, "x", code=CodedTerm("10200004", "SCT", "Liver"))
    made = dataset(dicom_seg.binary_bytes(segmented(series, labels, own)))
    (segment,) = made.SegmentSequence
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Liver"
    assert segment.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Anatomical Structure"
    (observed,) = dataset(
        rtstruct.rtstruct_bytes(segmented(series, labels, own))
    ).RTROIObservationsSequence
    assert observed.RTROIIdentificationCodeSequence[0].CodeValue == "10200004"


def test_frames_refer_to_the_images_on_whose_planes_they_lie(series: Path) -> None:
    segmentation = two(series)
    sources = {str(dcmread(path).SOPInstanceUID): dcmread(path) for path in series.iterdir()}
    made = dataset(dicom_seg.binary_bytes(segmentation))
    assert made.StudyInstanceUID == next(iter(sources.values())).StudyInstanceUID
    assert made.FrameOfReferenceUID == IDS["FrameOfReferenceUID"]
    (referenced,) = made.ReferencedSeriesSequence
    named = {str(one.ReferencedSOPInstanceUID) for one in referenced.ReferencedInstanceSequence}
    assert named == set(sources)
    frames = made.PerFrameFunctionalGroupsSequence
    assert len(frames) == 3
    for frame in frames:
        source = sources[
            frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        ]
        assert source.ImagePositionPatient == frame.PlanePositionSequence[0].ImagePositionPatient
    contours = dataset(rtstruct.rtstruct_bytes(segmentation)).ROIContourSequence[0].ContourSequence
    assert len(contours) == 2
    for contour in contours:
        uid = str(contour.ContourImageSequence[0].ReferencedSOPInstanceUID)
        assert float(contour.ContourData[2]) == float(sources[uid].ImagePositionPatient[2])


def test_frames_of_an_enhanced_image_are_named_by_their_numbers(tmp_path: Path) -> None:
    depths = [4.0, 0.0, 2.0]
    path = write_enhanced(
        tmp_path / "a.dcm",
        np.arange(3 * 64).reshape(3, 8, 8),
        depths_mm=depths,
        StudyInstanceUID="1.2.3",
        SeriesInstanceUID="1.2.4",
        **IDS,
    )
    labels = np.zeros((3, 8, 8), np.uint8)
    labels[1, 2:5, 2:5] = labels[2, 1, 1] = 1  # at 2 and 4 mm
    segmentation = segmented(path, labels, SegmentedObject(1, "a"))
    for frame in dataset(dicom_seg.binary_bytes(segmentation)).PerFrameFunctionalGroupsSequence:
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        place = frame.PlanePositionSequence[0].ImagePositionPatient
        assert depths[source.ReferencedFrameNumber - 1] == float(place[2])
    (region,) = dataset(rtstruct.rtstruct_bytes(segmentation)).ROIContourSequence
    for contour in region.ContourSequence:
        number = contour.ContourImageSequence[0].ReferencedFrameNumber
        assert depths[number - 1] == float(contour.ContourData[2])


def test_a_repeat_has_the_same_uids_and_a_change_others(series: Path) -> None:
    segmentation = two(series)
    changed = replace(segmentation, labels=np.where(segmentation.labels == 2, 1, 0).astype("u1"))
    for bytes_of in (dicom_seg.binary_bytes, rtstruct.rtstruct_bytes):
        first, again, other = (
            dataset(bytes_of(each)) for each in (segmentation, two(series), changed)
        )
        assert first.SOPInstanceUID == again.SOPInstanceUID != other.SOPInstanceUID
        assert first.file_meta.MediaStorageSOPInstanceUID == first.SOPInstanceUID
        assert first.SeriesInstanceUID == again.SeriesInstanceUID != other.SeriesInstanceUID
        assert str(first.SOPInstanceUID).startswith("2.25.")
        assert len(first.SOPInstanceUID) <= 64
    moved = replace(segmentation, labels=np.roll(segmentation.labels, 1, axis=0))
    first, other = (dataset(dicom_seg.binary_bytes(each)) for each in (segmentation, moved))
    assert first.PixelData == other.PixelData
    assert first.SOPInstanceUID != other.SOPInstanceUID
    assert first.SeriesInstanceUID != other.SeriesInstanceUID
    tracked = [
        [one.TrackingUID for one in dataset(dicom_seg.binary_bytes(each)).SegmentSequence]
        for each in (segmentation, changed)
    ]
    assert tracked[0] == tracked[1]


def test_more_than_255_objects_some_of_them_empty(tmp_path: Path) -> None:
    write_dicom_series(tmp_path / "ct", np.arange(2 * 144).reshape(2, 12, 12), **IDS)
    labels = np.arange(2 * 144, dtype=np.uint16).reshape(2, 12, 12) % 260
    labels[labels == 7] = 0
    objects = [SegmentedObject(label, f"cell {label}") for label in range(1, 261)]
    segmentation = segmented(tmp_path / "ct", labels, *objects)
    paths = planned(segmentation.image, ["dicom-seg", "rtstruct", "csv"], tmp_path)
    write(segmentation, paths)
    made = dcmread(paths["dicom-seg"])
    assert len(made.SegmentSequence) == 260
    sources = list((tmp_path / "ct").iterdir())
    for number in (1, 256, 259):
        z, y, x = np.nonzero(labels == number)
        expected = np.stack([x * 0.8 - 100, y * 0.7 - 80, z * 2.5 + 30], axis=1)
        assert same_points(by_frames(paths["dicom-seg"], number), expected)
        assert same_points(by_polygons(paths["rtstruct"], sources, number), expected)
    assert len(by_polygons(paths["rtstruct"], sources, 7)) == 0
    shown = {
        int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        for frame in made.PerFrameFunctionalGroupsSequence
    }
    assert shown == set(range(1, 260)) - {7}


def test_labels_need_not_be_in_a_row(series: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1, 2, 3], labels[2, 4, 5] = 5, 200
    objects = SegmentedObject(5, "a"), SegmentedObject(200, "b")
    content = dicom_seg.binary_bytes(segmented(series, labels, *objects))
    (series.parent / "a.dcm").write_bytes(content)
    assert same_points(by_frames(series.parent / "a.dcm", 2), np.array([[-96, -77.2, 35]]))
    assert [one.SegmentLabel for one in dataset(content).SegmentSequence] == ["a", "b"]


def test_nothing_found_is_one_empty_frame_an_object(series: Path) -> None:
    objects = SegmentedObject(1, "a"), SegmentedObject(2, "b")
    segmentation = segmented(series, np.zeros(SHAPE, np.uint8), *objects)
    made = dataset(dicom_seg.binary_bytes(segmentation))
    assert made.NumberOfFrames == 2
    assert not made.pixel_array.any()
    regions = dataset(rtstruct.rtstruct_bytes(segmentation)).ROIContourSequence
    assert ["ContourSequence" in region for region in regions] == [False, False]


def test_fractions_are_probabilities_where_something_was_decoded_or_drawn(series: Path) -> None:
    segmentation = two(series)
    confidence = segmentation.confidence.copy()
    confidence[:, [0, 3]] = confidence[1, 1] = np.nan
    confidence[0, 2] = np.nan  # the first object was drawn here
    known = replace(
        segmentation,
        confidence=confidence,
        fractions=lambda label, z: np.full(SHAPE[1:], label / 4 + z / 100, np.float32),
    )
    made = dataset(dicom_seg.fractional_bytes(known))
    assert (made.SegmentationType, made.SegmentationFractionalType) == ("FRACTIONAL", "PROBABILITY")
    assert made.MaximumFractionalValue == 255
    found = {}
    for frame, plane in zip(made.PerFrameFunctionalGroupsSequence, made.pixel_array, strict=True):
        z = round((float(frame.PlanePositionSequence[0].ImagePositionPatient[2]) - 30) / 2.5)
        number = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        if plane.any():
            found[number, z] = set(plane.ravel().tolist())
    expected = {(1, 1): 0.26, (1, 2): 0.27, (2, 2): 0.52}
    assert found == {key: {round(value * 255)} for key, value in expected.items()}
    with pytest.raises(InputError, match=r"no probabilities were kept.*use dicom-seg"):
        dicom_seg.fractional_bytes(segmentation)


@pytest.mark.parametrize("name", ["dicom-seg", "dicom-seg-fractional", "rtstruct"])
def test_what_has_nothing_to_refer_to_is_refused_before_any_work(
    name: str, series: Path, tmp_path: Path
) -> None:
    np.savez(
        tmp_path / "a.npz",
        imgs=np.arange(192, dtype=np.uint8).reshape(3, 8, 8),
        spacing=[1.0, 1, 1],
    )
    with pytest.raises(InputError, match=r"refers to the DICOM images.*use nifti or npz"):
        planned(read_image(tmp_path / "a.npz"), [name], tmp_path)
    volume = read_image(series, window=(500, 1000))
    planned(volume, [name], tmp_path)
    gone = sorted(series.iterdir())[2]
    edit(gone, FrameOfReferenceUID=None)
    with pytest.raises(InputError, match=rf"{gone.name} has no FrameOfReferenceUID"):
        planned(volume, [name], tmp_path)
    gone.unlink()
    with pytest.raises(InputError, match=gone.name):
        planned(volume, [name], tmp_path)


def test_headers_that_are_no_valid_dicom_do_no_harm(
    series: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor is a patient's name told, which highdicom does in a warning where it finds one odd."""
    warnings.simplefilter("ignore")  # about writing such files; pytest restores it
    for path in series.iterdir():
        edit(
            path,
            PatientName="Doe Jane=x=y=z",
            PatientID=None,
            PatientSex="X",
            PatientBirthDate="unknown",
            StudyTime="noon",
            SliceThickness=None,
        )
    caplog.set_level(logging.DEBUG)
    for bytes_of in (dicom_seg.binary_bytes, rtstruct.rtstruct_bytes):
        with warnings.catch_warnings(action="error"):
            content = bytes_of(two(series))
        made = dataset(content)
        assert "Doe Jane" in str(made.PatientName)
        assert (made.PatientID, made.PatientSex, made.PatientBirthDate) == ("", "", "")
    assert "Doe" not in caplog.text
    assert "Doe" not in "".join(capfd.readouterr())


def test_a_name_in_another_alphabet_arrives(series: Path) -> None:
    for path in series.iterdir():
        edit(path, SpecificCharacterSet="ISO_IR 144", PatientName="Иванова^Анна")
    for bytes_of in (dicom_seg.binary_bytes, rtstruct.rtstruct_bytes):
        made = dataset(bytes_of(two(series)))
        assert made.SpecificCharacterSet == "ISO_IR 192"
        assert made.PatientName == "Иванова^Анна"


def test_no_more_of_the_patient_is_copied_than_must_be(series: Path) -> None:
    for path in series.iterdir():
        edit(
            path,
            PatientComments="secret",
            PatientAddress="secret",
            InstitutionName="secret",
            PatientIdentityRemoved="YES",
        )
    paths = planned(
        two(series).image, ["dicom-seg", "rtstruct", "nifti", "npz", "csv", "json"], series.parent
    )
    write(two(series), paths)
    for name, path in paths.items():
        assert b"secret" not in path.read_bytes()
        assert (b"Synthetic" in path.read_bytes()) == (name in ("dicom-seg", "rtstruct"))
    assert dcmread(paths["dicom-seg"]).PatientIdentityRemoved == "YES"
    assert dcmread(paths["rtstruct"]).PatientIdentityRemoved == "YES"


@pytest.mark.parametrize("kind", ["1.2.3.4.5", "1.2.840.10008.5.1.4.1.1.12.1"])
def test_a_kind_that_no_seg_is_made_of_is_refused_before_any_work(
    kind: str, series: Path, tmp_path: Path
) -> None:
    """A class of somebody's own; one of several frames, of which each has its own file."""
    for path in series.iterdir():
        edit(path, SOPClassUID=kind)
    volume = read_image(series, window=(500, 1000))
    with pytest.raises(InputError, match=r"no DICOM-SEG is made of this kind.*: use rtstruct"):
        planned(volume, ["dicom-seg"], tmp_path)
    assert planned(volume, ["rtstruct"], tmp_path)


def test_two_multi_frame_files_of_one_volume_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ct").mkdir()
    for part in range(2):
        write_enhanced(
            tmp_path / "ct" / f"{part}.dcm",
            np.arange(2 * 64).reshape(2, 8, 8),
            depths_mm=[4.0 * part, 4.0 * part + 2],
            StudyInstanceUID="1.2.3",
            SeriesInstanceUID="1.2.4",
            **IDS,
        )
    segmentation = segmented(tmp_path / "ct", np.ones((4, 8, 8), np.uint8), SegmentedObject(1, "a"))
    with pytest.raises(InputError, match=r"one of 2 multi-frame files.*use nifti"):
        planned(segmentation.image, ["dicom-seg"], tmp_path)
    assert rtstruct.rtstruct_bytes(segmentation)


@pytest.mark.parametrize(
    ("package", "name"), [("highdicom", "dicom-seg"), ("contourpy", "rtstruct")]
)
def test_a_missing_package_is_named_before_any_work(
    package: str, name: str, series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = read_image(series, window=(500, 1000))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingError, match=rf"needs {package}.*\n?.*dicom"):
        planned(volume, [name], tmp_path)
