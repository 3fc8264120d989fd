"""Objects added to an earlier result."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.dicom_series import write_dicom_series

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.npz_files import read_label_names
from dbsam_deploy.images.volumes import Volume, read_image
from dbsam_deploy.outputs.files import planned, write
from dbsam_deploy.outputs.merging import READABLE, merged, read_earlier
from dbsam_deploy.outputs.segmentation import Segmentation, SegmentedObject

pytest.importorskip("highdicom")
IDS = {"FrameOfReferenceUID": "1.2.826.0.1.3680043.8.498.1"}


@pytest.fixture
def image(tmp_path: Path) -> Volume:
    write_dicom_series(tmp_path / "ct", np.arange(4 * 64).reshape(4, 8, 8), **IDS)
    return read_image(tmp_path / "ct")


def boxes(image: Volume, **names: tuple[int, int]) -> Segmentation:
    """An object of each name, on its rows of slice 1; the first has label 1."""
    labels = np.zeros(image.shape, np.uint8)
    for label, rows in enumerate(names.values(), 1):
        labels[1, slice(*rows)] = label
    objects = tuple(SegmentedObject(label, name) for label, name in enumerate(names, 1))
    confidence = np.full((len(names), image.shape[0]), 0.9, np.float32)
    return Segmentation(image, labels, objects, confidence, "toy", fractions=lambda *_: labels[0])


@pytest.mark.parametrize("name", READABLE)
def test_new_objects_follow_those_of_a_file(name: str, image: Volume, tmp_path: Path) -> None:
    paths = planned(image, [name], tmp_path)
    write(boxes(image, liver=(0, 2), spleen=(3, 5)), paths)
    both = merged(read_earlier(image, paths), boxes(image, kidney=(4, 7)))
    names = ["object 1", "object 2"] if name == "nifti" else ["liver", "spleen"]
    assert [(one.label, one.name) for one in both.objects] == [
        *enumerate(names, 1),
        (3, "kidney"),
    ]
    assert both.labels[1, :, 0].tolist() == [1, 1, 0, 2, 3, 3, 3, 0]
    assert both.labels.dtype == np.uint8
    assert np.isnan(both.confidence[:2]).all()
    assert (both.confidence[2] == np.float32(0.9)).all()
    assert both.fractions is None
    write(both, paths)
    again = read_earlier(image, paths)
    assert np.array_equal(again.labels, both.labels)
    assert len(again.objects) == 3


def test_an_object_that_is_there_is_replaced_only_when_told_to(
    image: Volume, tmp_path: Path
) -> None:
    paths = planned(image, ["npz", "nifti"], tmp_path)
    write(boxes(image, liver=(0, 2), spleen=(3, 5)), paths)
    before = [path.read_bytes() for path in paths.values()]
    earlier, new = read_earlier(image, paths), boxes(image, kidney=(6, 7), liver=(1, 4))
    with pytest.raises(InputError, match=r"has 'liver' already, label 1: --overwrite replaces it"):
        merged(earlier, new)
    assert [path.read_bytes() for path in paths.values()] == before
    both = merged(earlier, new, overwrite=True)
    assert [(one.label, one.name) for one in both.objects] == [
        (1, "liver"),
        (2, "spleen"),
        (3, "kidney"),
    ]
    assert both.labels[1, :, 0].tolist() == [0, 1, 1, 1, 2, 0, 3, 0]
    write(both, paths)
    assert read_label_names(paths["npz"]) == {1: "liver", 2: "spleen", 3: "kidney"}


def test_a_long_name_is_known_again_from_dicom(image: Volume, tmp_path: Path) -> None:
    paths = planned(image, ["dicom-seg"], tmp_path)
    write(boxes(image, **{"x" * 70: (0, 2)}), paths)
    with pytest.raises(InputError, match="already, label 1"):
        read_earlier(image, paths).check(["x" * 70])


def test_there_must_be_something_to_add_to(image: Volume, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing to add to: expected .*ct_mask\.nii\.gz$"):
        read_earlier(image, planned(image, ["nifti"], tmp_path))
    with pytest.raises(InputError, match=r"objects can be added to npz, dicom-seg, nifti"):
        read_earlier(image, planned(image, ["png"], tmp_path))


def test_a_result_of_another_image_is_refused(image: Volume, tmp_path: Path) -> None:
    paths = planned(image, ["npz"], tmp_path)
    write(boxes(image, liver=(0, 2)), paths)
    small = replace(image, pixels=image.pixels[:3])
    with pytest.raises(InputError, match=r"segs uint8\(4, 8, 8\), expected .*\(3, 8, 8\)"):
        read_earlier(small, paths)


def test_more_than_255_objects_widen_the_label_map(image: Volume, tmp_path: Path) -> None:
    paths = planned(image, ["npz"], tmp_path)
    labels = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8)
    objects = tuple(SegmentedObject(label, f"cell {label}") for label in range(1, 256))
    confidence = np.ones((255, 4), np.float32)
    write(Segmentation(image, labels, objects, confidence, "toy"), paths)
    both = merged(read_earlier(image, paths), boxes(image, liver=(0, 2)))
    assert both.labels.dtype == np.uint16
    assert (both.labels[1, :2] == 256).all()
    assert np.array_equal(both.labels[2:], labels[2:])
