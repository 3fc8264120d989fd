"""Folders of NIfTI pairs as nnU-Net, the Decathlon and others lay them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.labelled_sets import IMAGE, LABELS, write_nifti

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.datasets.cases import Reading, read_case
from dbsam_deploy.datasets.finding import find_cases, find_labelled

pytest.importorskip("nibabel")
pytest.importorskip("SimpleITK")

NAMES = {"background": 0, "liver": 1, "tumour": 2}


def write_json(folder: Path, **content: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(content))


def pair(folder: Path, image: str, labels: str, values: npt.NDArray[Any] = IMAGE) -> None:
    write_nifti(folder / image, values)
    write_nifti(folder / labels, LABELS)


def names_in(folder: Path) -> list[tuple[str, str]]:
    return [(case.task, case.name) for case in find_cases(folder)]


def test_nnunet(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset009_Spleen"
    write_json(folder, channel_names={"0": "CT"}, labels=NAMES, file_ending=".nii.gz")
    pair(folder, "imagesTr/la_003_0000.nii.gz", "labelsTr/la_003.nii.gz")
    write_nifti(folder / "imagesTr" / "._la_003_0000.nii.gz", IMAGE)  # of macOS
    write_nifti(folder / "imagesTs" / "la_004_0000.nii.gz", IMAGE)  # without labels
    (case,) = find_cases(folder)
    assert (case.task, case.name) == ("Dataset009_Spleen", "la_003")
    read = read_case(case)
    np.testing.assert_array_equal(read.labels, LABELS)
    assert read.label_names == {1: "liver", 2: "tumour"}
    assert read.file_name == "la_003.npz"
    assert read.volume.spacing_mm == pytest.approx((2.5, 0.8, 0.7))
    # HU, as dataset.json says: soft tissue, -160 to 240
    assert read.volume.pixels[0, 0, 0] == int((-20 + 160) / 400 * 255)
    assert "soft-tissue" in read.notes[0]
    (wide,) = find_cases(folder, reading=Reading(window=(0.0, 40.0)))
    assert read_case(wide).volume.pixels[0, 0, 0] == 0


def test_one_of_several_channels(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset001"
    write_json(folder, channel_names={"0": "T2", "1": "ADC"}, labels=NAMES)
    pair(folder, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    write_nifti(folder / "imagesTr" / "a_0001.nii.gz", np.flip(IMAGE, 0))
    with pytest.raises(InputError, match=r"2 modalities \(0 T2, 1 ADC\): choose one") as caught:
        find_cases(folder)
    assert "\n" not in str(caught.value)
    for name in ("adc", "1"):
        (case,) = find_cases(folder, reading=Reading(modality=name))
        assert case.path.name == "a_0001.nii.gz"
    with pytest.raises(InputError, match=r"modality 'T1'.*0 T2, 1 ADC"):
        find_cases(folder, reading=Reading(modality="T1"))
    (folder / "imagesTr" / "a_0001.nii.gz").unlink()
    with pytest.raises(InputError, match=r"a\.nii\.gz has no image of modality 1"):
        find_cases(folder, reading=Reading(modality="1"))


def decathlon(folder: Path, values: npt.NDArray[Any] = IMAGE, **more: Any) -> None:
    pair(folder, "imagesTr/b_1.nii.gz", "labelsTr/b_1.nii.gz", values)
    listed = [{"image": "./imagesTr/b_1.nii.gz", "label": "./labelsTr/b_1.nii.gz"}]
    labels = {str(label): name for name, label in NAMES.items()}
    write_json(folder, labels=labels, training=listed, test=["./imagesTs/x.nii.gz"], **more)


def test_decathlon(tmp_path: Path) -> None:
    decathlon(tmp_path / "Task03_Liver", modality={"0": "CT"})
    write_nifti(tmp_path / "Task03_Liver" / "imagesTr" / "unlisted.nii.gz", IMAGE)
    assert names_in(tmp_path) == [("Task03_Liver", "Task03_Liver/b_1")]
    read = read_case(find_cases(tmp_path)[0])
    assert read.label_names == {1: "liver", 2: "tumour"}
    assert "soft-tissue" in read.notes[0]


def test_listed_pairs_whose_channels_are_files(tmp_path: Path) -> None:
    """As nnU-Net's first version wrote them."""
    decathlon(tmp_path, modality={"0": "T2", "1": "ADC"})
    folder = tmp_path / "imagesTr"
    (folder / "b_1.nii.gz").rename(folder / "b_1_0000.nii.gz")
    write_nifti(folder / "b_1_0001.nii.gz", np.flip(IMAGE, 0))
    (case,) = find_cases(tmp_path, reading=Reading(modality="adc"))
    assert (case.name, case.path.name) == ("b_1", "b_1_0001.nii.gz")
    (folder / "b_1_0000.nii.gz").unlink()
    (folder / "b_1_0001.nii.gz").unlink()
    with pytest.raises(InputError, match=r"b_1\.nii\.gz is listed in dataset\.json, but"):
        find_cases(tmp_path, reading=Reading(modality="adc"))


def test_a_short_name_that_its_suffix_has_too(tmp_path: Path) -> None:
    pair(tmp_path, "imagesTr/i_0000.nii.gz", "labelsTr/i.nii.gz")
    listed = [{"image": "imagesTr/i.nii.gz", "label": "labelsTr/i.nii.gz"}]
    write_json(tmp_path, labels=NAMES, channel_names={"0": "T2"}, training=listed)
    assert [case.path.name for case in find_cases(tmp_path)] == ["i_0000.nii.gz"]


def test_a_4d_image_of_the_decathlon(tmp_path: Path) -> None:
    values = np.stack([IMAGE, np.flip(IMAGE, 2)], -1)
    decathlon(tmp_path, values, modality={"0": "FLAIR", "1": "T1w"})
    with pytest.raises(InputError, match=r"0 FLAIR, 1 T1w\): choose one with --modality"):
        find_cases(tmp_path)
    (case,) = find_cases(tmp_path, reading=Reading(modality="T1w"))
    read = read_case(case)
    np.testing.assert_array_equal(read.labels, LABELS)
    order = np.argsort(values[1, :, :, 1], axis=None, kind="stable")
    assert (np.diff(read.volume.pixels[1].ravel()[order].astype(int)) >= 0).all()


def test_a_4d_image_of_which_nothing_is_known(tmp_path: Path) -> None:
    pair(tmp_path, "images/x.nii.gz", "labels/x.nii.gz", np.stack([IMAGE, IMAGE], -1))
    (case,) = find_cases(tmp_path)
    with pytest.raises(
        InputError, match="holds 2 images of one grid: choose one with --modality 0"
    ):
        read_case(case)
    (case,) = find_cases(tmp_path, reading=Reading(modality="1"))
    np.testing.assert_array_equal(read_case(case).labels, LABELS)


def test_paired_folders_and_files_side_by_side(tmp_path: Path) -> None:
    pair(tmp_path, "mr/images/a.nii", "mr/labels/a.nii.gz")
    pair(tmp_path, "ct/x.nii.gz", "ct/x_mask.nii.gz")
    pair(tmp_path, "ct/deep/y.nii.gz", "ct/deep/y_seg.nii.gz")
    assert names_in(tmp_path) == [("ct", "ct/x"), ("ct/deep", "ct/deep/y"), ("mr", "mr/a")]
    for case in find_cases(tmp_path):
        read = read_case(case)
        np.testing.assert_array_equal(read.labels, LABELS)
        assert read.label_names == {}
    split = tmp_path / "split.json"
    split.write_text('{"train": ["mr/a"], "validation": ["ct/deep/y", "ct/x"]}')
    chosen = find_cases(tmp_path, split=split, subset="validation")
    assert [case.name for case in chosen] == ["ct/deep/y", "ct/x"]


def test_labels_that_nobody_judged_are_outside(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1], "ignore": 2}
    write_json(tmp_path, labels=labels, channel_names={"0": "T1"})
    pair(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    read = read_case(find_cases(tmp_path)[0])
    np.testing.assert_array_equal(read.labels, np.where(LABELS == 2, 0, LABELS))
    assert read.label_names == {1: "whole"}
    assert read.notes == ("label 2, which is to be ignored, counts as outside",)


def test_a_label_that_the_data_set_does_not_name(tmp_path: Path) -> None:
    write_json(tmp_path, labels={"background": 0, "liver": 1}, channel_names={"0": "T1"})
    pair(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    with pytest.raises(InputError, match=r"a\.nii\.gz holds label 2.*it has 1 liver"):
        read_case(find_cases(tmp_path)[0])


FAULTS = {
    "no label map": (
        {"images/a.nii.gz", "labels/b.nii.gz"},
        r"a\.nii\.gz has no label map .*labels",
    ),
    "no image": (
        {"images/a.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz"},
        r"b\.nii\.gz has no image of its name",
    ),
    "two suffixes": (
        {"images/a.nii.gz", "images/a.nii", "labels/a.nii.gz"},
        r"a\.nii\.gz stands beside a\.nii: keep one",
    ),
    "mask and seg": ({"x.nii.gz", "x_seg.nii.gz", "x_mask.nii.gz"}, "stands beside x_mask"),
    "alone": ({"x.nii.gz"}, r"x\.nii\.gz has no label map of its name in this folder"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_files_without_a_partner_are_named(tmp_path: Path, name: str) -> None:
    files, message = FAULTS[name]
    for file in files:
        write_nifti(tmp_path / file, LABELS)
    with pytest.raises(InputError, match=message) as caught:
        find_cases(tmp_path)
    assert "\n" not in str(caught.value)
    assert find_labelled(tmp_path).left_out


JSONS = {
    "{": "not readable as nnU-Net's or the Decathlon's",
    '{"labels": [1]}': "not readable as nnU-Net's",
    '{"labels": {"liver": "one"}}': "not readable as nnU-Net's",
    '{"labels": {}, "training": [{"image": "/x.nii.gz", "label": "y.nii.gz"}]}': "a path below",
    '{"labels": {}, "training": [{"image": "x.nii.gz", "label": "../y.nii.gz"}]}': "a path below",
    '{"labels": {}, "training": [{"image": "x.nii.gz"}]}': "not readable as nnU-Net's",
    '{"labels": {}, "training": [{"image": "x.nii.gz", "label": "y.nii.gz"}]}': "but is no NIfTI",
    '{"labels": {}}': "lists no training images",
    '{"name": "other"}': "no labelled images",
}


@pytest.mark.parametrize("text", JSONS)
def test_an_unusable_dataset_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=JSONS[text]) as caught:
        find_cases(tmp_path)
    assert "\n" not in str(caught.value)


def test_npz_alone_where_there_are_any(tmp_path: Path) -> None:
    pair(tmp_path, "images/a.nii.gz", "labels/a.nii.gz")
    np.savez(tmp_path / "a.npz", imgs=IMAGE.astype(np.float32), gts=LABELS)
    assert names_in(tmp_path) == [(tmp_path.name, "a.npz")]
    with pytest.raises(InputError, match="an npz is read as stored"):
        find_cases(tmp_path, reading=Reading(window=(40.0, 400.0)))
