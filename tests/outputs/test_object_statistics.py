"""Numbers of objects, against the definition."""

import csv
import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from support.dicom_series import write_dicom_series

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.arrays import as_volume
from dbsam_deploy.images.volumes import Volume, read_image
from dbsam_deploy.outputs.object_statistics import csv_bytes, json_bytes, measure
from dbsam_deploy.outputs.segmentation import Segmentation, SegmentedObject

LABELS = np.zeros((4, 6, 8), np.uint16)
LABELS[1:3, 2:5, 3:4] = 1
LABELS[2, 5, 0:7] = 300


def segmented(volume: Volume) -> Segmentation:
    objects = tuple(SegmentedObject(n, f"n{n}") for n in (1, 7, 300))
    confidence = np.full((3, 4), np.nan, np.float32)
    confidence[0, 1:3] = 0.5, 0.75
    return Segmentation(volume, LABELS, objects, confidence, "toy", note="untrained")


def test_a_ct_is_measured_in_hu(tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.integers(-900, 2000, LABELS.shape)
    write_dicom_series(tmp_path / "ct", values, spacing_mm=(2.5, 0.5, 0.8))
    first, empty, last = measure(segmented(read_image(tmp_path / "ct")))
    assert (first.label, first.name, first.voxels, first.unit) == (1, "n1", 6, "HU")
    assert first.volume_ml == pytest.approx(6 * 2.5 * 0.5 * 0.8 / 1000)
    assert first.mean == pytest.approx(values[LABELS == 1].mean(), abs=1e-4)
    assert first.std == pytest.approx(values[LABELS == 1].std(), abs=1e-4)
    assert first.first_voxel == (3, 2, 1)
    assert first.extent_voxels == (1, 3, 2)
    assert first.extent_mm == pytest.approx((0.8, 1.5, 5.0))
    assert first.confidence == pytest.approx(0.625)
    assert (empty.voxels, empty.volume_ml, empty.mean, empty.extent_mm) == (0, 0, None, None)
    assert (last.first_voxel, last.extent_voxels) == ((0, 5, 2), (7, 1, 1))
    assert last.mean == pytest.approx(values[LABELS == 300].mean(), abs=1e-4)
    assert last.confidence == 0


def test_padding_is_no_measurement(tmp_path: Path) -> None:
    values = np.full(LABELS.shape, 40)
    values[1, 2, 3], values[0] = -1000, 90
    write_dicom_series(tmp_path / "ct", values, PixelPaddingValue=24, PixelRepresentation=0)
    first, _, _ = measure(segmented(read_image(tmp_path / "ct", window=(40, 400))))
    assert (first.voxels, first.mean) == (6, 40)


@pytest.mark.parametrize("kind", ["npz", "nifti", "4D nifti"])
def test_other_files_are_read_again(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.integers(-900, 2000, LABELS.shape).astype(np.int16)
    if kind == "npz":
        np.savez(tmp_path / "a.npz", imgs=values, spacing=[3.0, 2.0, 1.0])
        volume = read_image(tmp_path / "a.npz")
    else:
        nibabel = pytest.importorskip("nibabel")
        array = values.transpose(2, 1, 0)
        array = np.stack([-array, array], axis=3) if kind == "4D nifti" else array
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 2, 3, 1])), tmp_path / "a.nii.gz")
        volume = read_image(tmp_path / "a.nii.gz", volume=1 if kind == "4D nifti" else None)
    first, _, last = measure(segmented(volume))
    assert first.mean == pytest.approx(values[LABELS == 1].mean(), abs=1e-4)
    assert last.std == pytest.approx(values[LABELS == 300].std(), abs=1e-4)
    assert (first.unit, first.volume_ml) == ("stored value", pytest.approx(0.036))


def test_sheared_voxels_have_their_own_volume(tmp_path: Path) -> None:
    """As of a tilted gantry: 2 mm apart along the slices' normal, not along the third axis."""
    nibabel = pytest.importorskip("nibabel")
    affine = np.diag([1.0, 1, 2, 1])
    affine[1, 2] = 1.5
    array = np.arange(LABELS.size, dtype=np.int16).reshape(LABELS.shape).transpose(2, 1, 0)
    image = nibabel.Nifti1Image(array, None)
    image.set_sform(affine, code="scanner")
    nibabel.save(image, tmp_path / "a.nii")
    first, _, _ = measure(segmented(read_image(tmp_path / "a.nii")))
    assert first.volume_ml == pytest.approx(6 * 2 / 1000)
    assert first.extent_mm == pytest.approx((1, 3, 5))


@pytest.mark.parametrize("kind", ["npz", "nifti", "dicom"])
def test_files_of_another_shape_by_now_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / {"npz": "a.npz", "nifti": "a.nii", "dicom": "ct"}[kind]

    def write(shape: tuple[int, ...]) -> None:
        values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
        if kind == "npz":
            np.savez(path, imgs=values, spacing=[3.0, 2.0, 1.0])
        elif kind == "nifti":
            nibabel = pytest.importorskip("nibabel")
            nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0), np.eye(4)), path)
        else:
            write_dicom_series(path, values)

    write(LABELS.shape)
    segmentation = segmented(read_image(path))
    write((4, 6, 9))
    with pytest.raises(InputError, match=r"\(4, 6, 9\) voxels .* by now, \(4, 6, 8\) when"):
        measure(segmentation)


def test_what_is_unknown_is_empty_in_the_table_and_null_in_json() -> None:
    volume = as_volume(np.arange(LABELS.size).reshape(LABELS.shape).astype(np.float32))
    segmentation = segmented(volume)
    content = json.loads(json_bytes(segmentation))
    assert content["model"] == "toy"
    assert content["note"] == "untrained"
    assert content["objects"][0]["volume_ml"] is None
    assert content["objects"][0]["extent_voxels"] == [1, 3, 2]
    rows = list(csv.DictReader(StringIO(csv_bytes(segmentation).decode())))
    assert [row["name"] for row in rows] == ["n1", "n7", "n300"]
    assert (rows[0]["voxels"], rows[0]["mean"], rows[0]["extent_mm_x"]) == ("6", "", "")
    assert [rows[2][f"first_voxel_{axis}"] for axis in "xyz"] == ["0", "5", "2"]
    assert rows[1]["extent_voxels_z"] == ""
