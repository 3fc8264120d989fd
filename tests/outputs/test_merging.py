"""New objects beside those of a label map that is there."""

from pathlib import Path

import numpy as np
import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.volumes import Volume, read_image
from dbsam_deploy.outputs.files import planned, write
from dbsam_deploy.outputs.merging import earlier, merged
from dbsam_deploy.outputs.segmentation import Segmentation, SegmentedObject

nibabel = pytest.importorskip("nibabel")


@pytest.fixture
def scan(tmp_path: Path) -> Volume:
    affine = np.diag([-2.0, 1.5, 3.0, 1.0])
    values = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "ct.nii.gz")
    return read_image(tmp_path / "ct.nii.gz", window=(60, 120))


def segmented(scan: Volume, **slices: int) -> Segmentation:
    labels = np.zeros(scan.shape, np.uint8)
    for label, index in enumerate(slices.values(), 1):
        labels[index, 1:3] = label
    objects = tuple(SegmentedObject(label, name) for label, name in enumerate(slices, 1))
    return Segmentation(scan, labels, objects, np.ones((len(objects), 6), np.float32), "m")


def test_nifti_is_added_to_in_place(scan: Volume, tmp_path: Path) -> None:
    paths = planned(scan, ("nifti",), tmp_path / "out")
    assert earlier(scan, paths) is None
    write(segmented(scan, a=1, b=2), paths)
    old = earlier(scan, paths)
    assert old is not None
    whole = merged(old, segmented(scan, c=2, d=3))
    assert [(one.label, one.name) for one in whole.objects] == [
        (1, "label 1"),
        (2, "label 2"),
        (3, "c"),
        (4, "d"),
    ]
    assert whole.labels[:, 1, 0].tolist() == [0, 1, 3, 4, 0, 0]  # c covers b
    assert np.isnan(whole.confidence[:2]).all()


def test_nifti_of_another_place_is_refused(scan: Volume, tmp_path: Path) -> None:
    paths = planned(scan, ("nifti",), tmp_path / "out")
    write(segmented(scan, a=1), paths)
    file = nibabel.load(paths["nifti"])
    moved = file.affine.copy()
    moved[0, 3] += 1
    nibabel.save(nibabel.Nifti1Image(np.asarray(file.dataobj), moved), paths["nifti"])
    with pytest.raises(InputError, match="is of another image"):
        earlier(scan, paths)


def test_labels_beyond_255_have_room(scan: Volume) -> None:
    old = segmented(scan, a=1)
    many = Segmentation(
        scan, old.labels * np.uint8(255), (SegmentedObject(255, "z"),), old.confidence, "m"
    )
    whole = merged(many, segmented(scan, b=2))
    assert whole.labels.dtype == np.uint16
    assert whole.labels[:, 1, 0].tolist() == [0, 255, 256, 0, 0, 0]
