"""DICOM-SEG files of another writer (highdicom) as label maps of their series."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.damage import refusals
from support.dicom_series import edit, rotation, write_enhanced
from support.labelled_sets import write_seg, write_series

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.datasets.cases import Reading, read_case
from dbsam_deploy.datasets.dicom_seg import read_segments
from dbsam_deploy.datasets.finding import find_cases, find_labelled
from dbsam_deploy.images.volumes import read_image

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")

LABELS = np.zeros((5, 6, 7), np.uint8)
LABELS[1, 1:5, 2] = LABELS[1, 4, 2:6] = 1  # an L: no turn or mirror image of it is itself
LABELS[2, 1:3, 2] = 1
LABELS[3:, 0, 5:] = 2
VOLUME = np.arange(LABELS.size).reshape(LABELS.shape) - 100


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
@pytest.mark.parametrize("angles", [(0, 0, 0), (11, -17, 29), (90, 0, 0)])
def test_each_frame_goes_to_the_image_it_names(
    tmp_path: Path, kind: str, angles: tuple[float, float, float]
) -> None:
    files = write_series(tmp_path / "ct", VOLUME, directions=rotation(*angles), digits=(10, 12))
    order = [3, 0, 4, 2, 1]
    pixels: npt.NDArray[Any] = LABELS[order]
    if kind == "FRACTIONAL":
        parts = np.stack([LABELS == 1, LABELS == 2], -1)
        pixels = np.where(parts, 0.6, 0.4).astype(np.float32)[order]
    seg = write_seg(tmp_path / "seg.dcm", [files[z] for z in order], pixels, kind)
    volume = read_image(tmp_path / "ct")
    found = read_segments(seg, volume)
    np.testing.assert_array_equal(found.values, LABELS)
    assert found.names == {1: "liver", 2: "spleen"}
    assert ("fractions" in " ".join(found.notes)) == (kind == "FRACTIONAL")
    if kind == "BINARY":  # highdicom's own reading of it, by position in the patient
        grid = highdicom.seg.segread(seg).get_volume(combine_segments=True)
        for z, y, x in np.argwhere(LABELS):
            place = volume.geometry.affine @ [x, y, z, 1]
            index = np.rint(grid.map_reference_to_indices((place[:3] * [-1, -1, 1])[None])[0])
            assert grid.array[tuple(index.astype(int))] == LABELS[z, y, x]


def test_frames_of_an_enhanced_file(tmp_path: Path) -> None:
    """Their slices are told by frame number, and stand in another order than in space."""
    path = write_enhanced(tmp_path / "ct.dcm", VOLUME, depths_mm=(6, 2, 4, 8, 10))
    volume = read_image(path)
    order = [1, 2, 0, 3, 4]
    source = write_series(
        tmp_path / "classic", VOLUME
    )  # a SEG for it, whose frames are then renamed
    seg = write_seg(tmp_path / "seg.dcm", source, LABELS)
    dataset, enhanced = pydicom.dcmread(seg), pydicom.dcmread(path)
    uids = [pydicom.dcmread(file).SOPInstanceUID for file in source]
    shared = dataset.SharedFunctionalGroupsSequence[0]
    measures = enhanced.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    shared.PixelMeasuresSequence[0].PixelSpacing = measures[0].PixelSpacing
    for groups in dataset.PerFrameFunctionalGroupsSequence:
        image = groups.DerivationImageSequence[0].SourceImageSequence[0]
        number = uids.index(image.ReferencedSOPInstanceUID)
        image.ReferencedSOPInstanceUID = enhanced.SOPInstanceUID
        image.ReferencedFrameNumber = number + 1
        own = enhanced.PerFrameFunctionalGroupsSequence[number].PlanePositionSequence
        groups.PlanePositionSequence = own
    dataset.save_as(seg)
    np.testing.assert_array_equal(read_segments(seg, volume).values, LABELS[order])


def change_frames(seg: Path, change: Any) -> None:
    dataset = pydicom.dcmread(seg)
    for groups in dataset.PerFrameFunctionalGroupsSequence:
        change(groups)
    dataset.save_as(seg)


def test_frames_that_name_no_image_are_placed_by_position(tmp_path: Path) -> None:
    files = write_series(tmp_path / "ct", VOLUME, directions=rotation(5, 6, 7))
    seg = write_seg(tmp_path / "seg.dcm", files, LABELS)
    change_frames(seg, lambda groups: delattr(groups, "DerivationImageSequence"))
    found = read_segments(seg, read_image(tmp_path / "ct"))
    np.testing.assert_array_equal(found.values, LABELS)
    assert any("name no image: placed by their position" in note for note in found.notes)


def move(offset: float) -> Any:
    def change(groups: Any) -> None:
        place = groups.PlanePositionSequence[0]
        x, y, z = place.ImagePositionPatient
        place.ImagePositionPatient = [float(x) + offset, y, z]

    return change


def test_rounding_is_accepted_and_said(tmp_path: Path) -> None:
    seg = write_seg(tmp_path / "seg.dcm", write_series(tmp_path / "ct", VOLUME), LABELS)
    change_frames(seg, move(0.02))
    found = read_segments(seg, read_image(tmp_path / "ct"))
    np.testing.assert_array_equal(found.values, LABELS)
    assert found.notes == ("seg.dcm lies 0.02 mm beside its images, taken for rounding",)


def rename(groups: Any) -> None:
    image = groups.DerivationImageSequence[0].SourceImageSequence[0]
    image.ReferencedSOPInstanceUID = "1.2.3"


def to_another_grid(path: Path, **values: object) -> None:
    dataset = pydicom.dcmread(path)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    for name, value in values.items():
        sequence = (
            shared.PlaneOrientationSequence if "Orient" in name else shared.PixelMeasuresSequence
        )
        setattr(sequence[0], name, value)
    dataset.save_as(path)


REFUSED = {
    "shifted": (
        lambda seg: change_frames(seg, move(0.4)),
        "lies 0.4 mm beside its image: resample",
    ),
    "other images": (lambda seg: change_frames(seg, rename), "refers to an image that is not in"),
    "other spacing": (
        lambda seg: to_another_grid(seg, PixelSpacing=[0.7, 0.7]),
        "pixel_spacing is",
    ),
    "mirrored": (
        lambda seg: to_another_grid(seg, ImageOrientationPatient=[-1, 0, 0, 0, 1, 0]),
        "orientation is .*resample",
    ),
    "cut": (lambda seg: seg.write_bytes(seg.read_bytes()[:-20]), "cut short"),
    "no segments": (lambda seg: edit(seg, SegmentSequence=None), "expected numbers 1 to 65535"),
    "another kind": (lambda seg: edit(seg, SegmentationType="WAVES"), "expected a SEG of type"),
    "a segment that is not described": (
        lambda seg: change_frames(
            seg,
            lambda groups: setattr(
                groups.SegmentIdentificationSequence[0], "ReferencedSegmentNumber", 7
            ),
        ),
        "is of segment 7",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    seg = write_seg(tmp_path / "seg.dcm", write_series(tmp_path / "ct", VOLUME), LABELS)
    damage, message = REFUSED[name]
    damage(seg)
    with pytest.raises(InputError, match=message) as caught:
        read_segments(seg, read_image(tmp_path / "ct"))
    assert "\n" not in str(caught.value)


def test_segments_that_overlap_make_no_label_map(tmp_path: Path) -> None:
    both = np.stack([LABELS == 1, LABELS > 0], -1).astype(np.uint8)
    seg = write_seg(tmp_path / "seg.dcm", write_series(tmp_path / "ct", VOLUME), both)
    with pytest.raises(InputError, match="'liver' and 'spleen' overlap"):
        read_segments(seg, read_image(tmp_path / "ct"))


def test_series_and_seg_are_paired_across_folders(tmp_path: Path) -> None:
    root = tmp_path / "lungs"
    for patient in ("p1", "p2"):
        files = write_series(root / patient / "study" / "ct", VOLUME)
        write_seg(root / patient / "study" / "seg" / "1.dcm", files, LABELS)
    write_series(root / "p2" / "study" / "scout", VOLUME)
    write_seg(root / "p2" / "study" / "seg" / "2.dcm", files, LABELS // 2)
    cases = find_cases(root)
    names = ["p1_study", "p2_study_1", "p2_study_2"]
    assert [(case.task, case.name) for case in cases] == [("lungs", name) for name in names]
    read = [read_case(case) for case in cases]
    np.testing.assert_array_equal(read[0].labels, LABELS)
    np.testing.assert_array_equal(read[2].labels, LABELS // 2)
    assert read[0].label_names == {1: "liver", 2: "spleen"}
    assert "soft-tissue" in str(read[0].volume.intensity)
    assert read[0].file_name == "p1_study.npz"
    ((path, why),) = [(one.path, one.why) for one in find_labelled(root).left_out]
    assert (path, why) == (root / "p2" / "study" / "scout", "has no SEG file that refers to it")
    (windowed, *_) = find_cases(root, reading=Reading(window=(0.0, 100.0)))
    assert "level 0 width 100" in str(read_case(windowed).volume.intensity)
    with pytest.raises(InputError, match="a DICOM series has one"):
        find_cases(root, reading=Reading(modality="T1"))


def test_more_than_is_described(tmp_path: Path) -> None:
    files = write_series(tmp_path / "ct", VOLUME)
    volume = read_image(tmp_path / "ct")
    halves = np.stack([LABELS == 1, LABELS == 2], -1).astype(np.float32)
    fractions = write_seg(tmp_path / "fractions.dcm", files, halves, "FRACTIONAL")
    edit(fractions, MaximumFractionalValue=100)
    with pytest.raises(InputError, match="a frame holds 255; expected 0 to 100"):
        read_segments(fractions, volume)
    labels = write_seg(tmp_path / "labels.dcm", files, LABELS, "LABELMAP")
    described = pydicom.dcmread(labels).SegmentSequence
    edit(labels, SegmentSequence=[one for one in described if one.SegmentNumber < 2])
    with pytest.raises(InputError, match=r"holds label 2; its segments are \[1\]"):
        read_segments(labels, volume)


def test_both_and_another_series_in_one_folder(tmp_path: Path) -> None:
    files = write_series(tmp_path / "ct", VOLUME)
    write_seg(tmp_path / "ct" / "seg.dcm", files, LABELS)
    for file in write_series(tmp_path / "other", VOLUME[:2]):
        file.rename(tmp_path / "ct" / f"other_{file.name}")
    (case,) = find_cases(tmp_path / "ct")
    read = read_case(case)
    assert (case.name, read.notes) == ("ct", ())
    np.testing.assert_array_equal(read.labels, LABELS)


def test_a_seg_of_two_series(tmp_path: Path) -> None:
    files = write_series(tmp_path / "data" / "ct", VOLUME)
    other = pydicom.dcmread(write_series(tmp_path / "data" / "other", VOLUME)[0])
    seg = write_seg(tmp_path / "data" / "seg.dcm", files, LABELS)

    def name_other(groups: Any) -> None:
        image = groups.DerivationImageSequence[0].SourceImageSequence[0]
        image.ReferencedSOPInstanceUID = other.SOPInstanceUID

    change_frames(seg, name_other)
    with pytest.raises(InputError, match=r"seg\.dcm refers to 2 series; expected one"):
        find_cases(tmp_path / "data")


def test_two_cases_of_one_name(tmp_path: Path) -> None:
    for place in ("P1/study", "p1_study"):
        write_seg(tmp_path / place / "1.dcm", write_series(tmp_path / place / "ct", VOLUME), LABELS)
    with pytest.raises(InputError, match=r"has the name of .*: rename one of them"):
        find_cases(tmp_path)


def test_a_seg_without_its_series(tmp_path: Path) -> None:
    files = write_series(tmp_path / "data" / "ct", VOLUME)
    write_seg(tmp_path / "data" / "seg.dcm", files, LABELS)
    for file in files:
        file.unlink()
    with pytest.raises(InputError, match=r"seg\.dcm refers to no series below"):
        find_cases(tmp_path / "data")
    (tmp_path / "data" / "broken.dcm").write_bytes(bytes(128) + b"DICM" + bytes(9))
    (tmp_path / "data" / "table.bin").write_bytes(b"\x08\x00" + bytes(range(200)))  # no DICOM
    reasons = {one.path.name: one.why for one in find_labelled(tmp_path / "data").left_out}
    assert reasons["broken.dcm"].startswith("cannot be read: ")
    assert set(reasons) == {"broken.dcm", "seg.dcm"}


def test_one_damaged_seg_does_not_end_the_search(tmp_path: Path) -> None:
    for name in ("a", "b"):
        files = write_series(tmp_path / name / "ct", VOLUME)
        seg = write_seg(tmp_path / name / f"{name}.dcm", files, LABELS)

    def number(groups: Any) -> None:
        groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber = 77

    change_frames(seg, number)
    whole = seg.read_bytes()
    damaged = whole.replace(b"\x08\x00\x60\x11IS\x02\x0077", b"\x08\x00\x60\x11IS\x02\x00x7")
    assert damaged != whole
    seg.write_bytes(damaged)
    found = find_labelled(tmp_path)
    assert [case.name for case in found.cases] == ["a"]
    reasons = {one.path.name: one.why for one in found.left_out}
    assert reasons["b.dcm"].startswith("cannot be read: ")


def test_an_image_less_by_now(tmp_path: Path) -> None:
    seg = write_seg(tmp_path / "seg.dcm", write_series(tmp_path / "ct", VOLUME), LABELS)
    volume = read_image(tmp_path / "ct")
    with pytest.raises(InputError, match=r"ct: \(4, .* by now, \(5, "):
        read_segments(seg, replace(volume, files=volume.files[:-1]))


def test_damage_is_refused_or_read(tmp_path: Path, rng: np.random.Generator) -> None:
    seg = write_seg(tmp_path / "seg.dcm", write_series(tmp_path / "ct", VOLUME), LABELS)
    volume = read_image(tmp_path / "ct")
    below = seg.stat().st_size
    refused = refusals(seg, lambda path: read_segments(path, volume), rng, times=60, below=below)
    assert refused > 10


@pytest.mark.parametrize("columns", [3, 5, 7, 8])
def test_bits_that_fill_no_byte(tmp_path: Path, rng: np.random.Generator, columns: int) -> None:
    labels = rng.integers(0, 3, (5, 3, columns)).astype(np.uint8)
    files = write_series(tmp_path / "ct", labels.astype(int))
    seg = write_seg(tmp_path / "seg.dcm", files, labels)
    np.testing.assert_array_equal(read_segments(seg, read_image(tmp_path / "ct")).values, labels)
