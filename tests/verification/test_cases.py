"""Cases from npz files with masks."""

import dataclasses

import numpy as np
import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import check_boxes, check_image
from dbsam_deploy.recipe import Parity
from dbsam_deploy.verification.cases import bundled_examples, load_cases

PARITY = Parity(images=6, boxes_per_image=8, box_jitter_px=20, min_object_px=16)


def test_bundled_examples_are_real_cases_from_every_file():
    cases = load_cases(bundled_examples(), PARITY)
    files = {case.name.split("[")[0] for case in cases}
    assert files == {path.stem for path in bundled_examples().glob("*.npz")}
    assert len(cases) == 6
    for case in cases:
        check_image(case.image)
        check_boxes(case.boxes, case.image.shape[:2])
        assert case.truth.shape == (len(case.boxes), *case.image.shape[:2])
        assert 1 <= len(case.boxes) <= 8


def test_boxes_contain_their_object_and_grow_by_no_more_than_the_jitter():
    for case in load_cases(bundled_examples(), PARITY):
        reach = 20 * max(case.image.shape[:2]) / 1024
        for box, mask in zip(case.boxes, case.truth, strict=True):
            rows, columns = np.nonzero(mask)
            tight = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            grown = np.abs(box - np.array(tight))
            assert (grown <= reach + 1e-4).all()
            assert box[0] <= tight[0]
            assert box[1] <= tight[1]
            assert box[2] >= tight[2]
            assert box[3] >= tight[3]


def test_the_choice_is_the_same_every_time():
    first, second = (load_cases(bundled_examples(), PARITY) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.name == b.name
        np.testing.assert_array_equal(a.boxes, b.boxes)


def write(path, **arrays):
    np.savez(path, **arrays)
    return path.parent


IMAGE = np.zeros((8, 9, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"imgs": IMAGE}, "no array `gts`"),
        ({"gts": np.zeros((8, 9), np.uint8)}, "no array `imgs`"),
        ({"imgs": IMAGE, "gts": np.zeros((8, 8), np.uint8)}, "expected whole numbers of shape"),
        ({"imgs": IMAGE, "gts": np.zeros((8, 9))}, "expected whole numbers"),
        ({"imgs": IMAGE, "gts": np.zeros((800, 900), np.uint8)}, "expected whole numbers of shape"),
        ({"imgs": IMAGE, "gts": np.zeros((8, 9), np.uint8)}, "no object of at least 16 pixels"),
        ({"imgs": IMAGE / 1.0, "gts": np.ones((8, 9), np.uint8)}, "expected uint8"),
        ({"imgs": IMAGE, "gts": np.array([[None]])}, "gts"),
    ],
)
def test_unusable_files_are_named(tmp_path, arrays, message):
    folder = write(tmp_path / "broken.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_cases(folder, PARITY)


def test_empty_folder(tmp_path):
    with pytest.raises(InputError, match=r"no \.npz files"):
        load_cases(tmp_path, PARITY)


def labelled(path, slices, empty=()):
    """An npz of `slices` images with one object each, but for the `empty` ones."""
    labels = np.zeros((slices, 8, 9), np.uint8)
    labels[:, 1:6, 1:6] = 1
    labels[list(empty)] = 0
    np.savez(path, imgs=np.zeros((slices, 8, 9, 3), np.uint8), gts=labels)


def counts_of(cases, names):
    files = [case.name.split("[")[0] for case in cases]
    assert len({case.name for case in cases}) == len(cases)
    return [files.count(name) for name in names]


def test_what_one_file_lacks_is_taken_from_the_others(tmp_path):
    for name, slices, empty in (("a", 1, ()), ("b", 9, (0, 3)), ("c", 5, ()), ("d", 2, (0, 1))):
        labelled(tmp_path / f"{name}.npz", slices, empty)
    for wanted, expected in (
        (2, [1, 1, 0, 0]),
        (4, [1, 2, 1, 0]),
        (8, [1, 4, 3, 0]),
        (13, [1, 7, 5, 0]),
        (50, [1, 7, 5, 0]),
    ):
        cases = load_cases(tmp_path, dataclasses.replace(PARITY, images=wanted))
        assert counts_of(cases, "abcd") == expected


def test_files_that_need_not_give_are_not_read(tmp_path):
    labelled(tmp_path / "a.npz", 4)
    (tmp_path / "b.npz").write_bytes(b"no npz")
    assert len(load_cases(tmp_path, dataclasses.replace(PARITY, images=1))) == 1
    with pytest.raises(InputError, match=r"b\.npz"):
        load_cases(tmp_path, dataclasses.replace(PARITY, images=2))
