"""A NIfTI label map lies exactly on its images, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.labelled_sets import IMAGE, LABELS, write_nifti

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.datasets.labels import ReadLabels, read_nifti_labels
from dbsam_deploy.images.nifti import count_volumes
from dbsam_deploy.images.volumes import read_image

nib = pytest.importorskip("nibabel")
pytest.importorskip("SimpleITK")

TURNED = (0, 1, 0, -1, 0, 0, 0, 0, 1)
OBLIQUE = (0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1)
LEFT_HANDED = (-1, 0, 0, 0, 1, 0, 0, 0, 1)


def read(folder: Path, labels: npt.NDArray[Any], theirs: Any = (), **ours: Any) -> ReadLabels:
    """Labels placed as `ours` for images placed as `theirs`."""
    images = write_nifti(folder / "image.nii.gz", IMAGE, **dict(theirs))
    return read_nifti_labels(write_nifti(folder / "map.nii.gz", labels, **ours), read_image(images))


@pytest.mark.parametrize("direction", [TURNED, OBLIQUE, LEFT_HANDED])
def test_labels_stay_on_their_voxels(tmp_path: Path, direction: tuple[float, ...]) -> None:
    found = read(tmp_path, LABELS, {"direction": direction}, direction=direction)
    np.testing.assert_array_equal(found.values, LABELS)
    assert found.notes == ()


@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.float32, np.float64])
def test_whole_numbers_of_any_type(tmp_path: Path, dtype: type) -> None:
    found = read(tmp_path, LABELS.astype(dtype))
    np.testing.assert_array_equal(found.values, LABELS)
    assert found.values.dtype.kind in "iu"


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.5"), (np.nan, "nan"), (3e9, "3e\\+09")])
def test_what_is_no_label_is_refused(tmp_path: Path, value: float, text: str) -> None:
    labels = LABELS.astype(np.float32)
    labels[0, 0, 0] = value
    with pytest.raises(InputError, match=f"holds {text}; expected whole numbers"):
        read(tmp_path, labels)


OTHER_GRIDS = {
    "fewer slices": (LABELS[:3], {}, "has 6×5×3 voxels, its images .* 6×5×4: resample"),
    "shifted": (LABELS, {"origin": (1.1, 2.0, 3.0)}, r"lies up to 0\.1 mm beside"),
    "other spacing": (LABELS, {"spacing": (0.7, 0.8, 2.6)}, r"lies up to 0\.3 mm beside"),
    "mirrored": (LABELS, {"direction": LEFT_HANDED}, "its axes run RPS, theirs LPS"),
    "turned": (LABELS, {"direction": OBLIQUE}, "lies up to"),
}


@pytest.mark.parametrize("name", OTHER_GRIDS)
def test_another_grid_is_never_resampled(tmp_path: Path, name: str) -> None:
    labels, place, message = OTHER_GRIDS[name]
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, labels, **place)
    assert "never done here" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rounding_is_accepted_and_said(tmp_path: Path) -> None:
    found = read(tmp_path, LABELS, origin=(1.01, 2.0, 3.0))
    np.testing.assert_array_equal(found.values, LABELS)
    assert found.notes == ("map.nii.gz lies 0.01 mm beside its images, taken for rounding",)


def test_several_volumes_are_no_label_map(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds 2 volumes; expected one label map"):
        read(tmp_path, np.stack([LABELS, LABELS], -1))


def test_counting_volumes_reads_the_header_alone(tmp_path: Path) -> None:
    shapes = {
        "a.nii.gz": (3, 4),
        "b.nii": (3, 4, 5),
        "c.nii.gz": (3, 4, 5, 1),
        "d.nii": (3, 4, 5, 6),
    }
    for name, shape in shapes.items():
        nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), tmp_path / name)
    assert [count_volumes(tmp_path / name) for name in shapes] == [1, 1, 1, 6]
    (tmp_path / "b.nii").write_bytes((tmp_path / "b.nii").read_bytes()[:352])
    assert count_volumes(tmp_path / "b.nii") == 1
    (tmp_path / "a.nii.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="is not a readable NIfTI file"):
        count_volumes(tmp_path / "a.nii.gz")
