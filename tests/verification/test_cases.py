"""Cases from npz files with masks."""

import dataclasses

import numpy as np
import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import check_boxes, check_image
from dbsam_deploy.recipe import Parity
from dbsam_deploy.verification.cases import bundled_examples, even_shares, load_cases, read_case

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


def two_objects(path, grey=False):
    """Five slices of 40×30; the last four have an object of 20×10 pixels and one of 4×4."""
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (5, 40, 30) if grey else (5, 40, 30, 3), dtype=np.uint8)
    labels = np.zeros((5, 40, 30), np.uint16)
    labels[1:, 5:25, 10:20], labels[1:, 30:34, 0:4] = 300, 2
    path.parent.mkdir(exist_ok=True)
    np.savez(path, imgs=images, gts=labels)
    return images, labels


EXACT = Parity(images=4, boxes_per_image=2, box_jitter_px=0, min_object_px=16)


@pytest.mark.parametrize("grey", [False, True])
def test_a_case_is_an_image_with_a_box_and_a_mask_for_each_object(tmp_path, grey):
    images, labels = two_objects(tmp_path / "sub" / "a.npz", grey)
    cases = load_cases(tmp_path, EXACT)
    assert [case.name for case in cases] == ["a[1]", "a[2]", "a[3]", "a[4]"]
    for index, case in enumerate(cases, 1):
        for channel in range(3):
            shown = images[index] if grey else images[index][..., channel]
            np.testing.assert_array_equal(case.image[..., channel], shown)
        assert case.image.flags.c_contiguous
        assert case.boxes.tolist() == [[0, 30, 4, 34], [10, 5, 20, 25]]
        assert case.boxes.dtype == np.float32
        np.testing.assert_array_equal(case.truth, [labels[index] == 2, labels[index] == 300])
        alone = read_case(tmp_path / "sub" / "a.npz", index, case.image, EXACT)
        assert (alone.name, alone.boxes.tolist()) == (case.name, case.boxes.tolist())
        np.testing.assert_array_equal(alone.truth, case.truth)
    fewer = load_cases(tmp_path, dataclasses.replace(EXACT, images=2))
    assert [case.name for case in fewer] == ["a[1]", "a[3]"]


def test_small_objects_and_slices_without_labels_are_left_out(tmp_path):
    images, _ = two_objects(tmp_path / "a.npz")
    larger = dataclasses.replace(EXACT, min_object_px=17)
    assert all(case.boxes.tolist() == [[10, 5, 20, 25]] for case in load_cases(tmp_path, larger))
    assert read_case(tmp_path / "a.npz", 0, images[0], EXACT) is None
    np.savez(tmp_path / "b.npz", imgs=images)
    assert read_case(tmp_path / "b.npz", 1, images[1], EXACT) is None
    (tmp_path / "b.npz").unlink()
    for case in load_cases(tmp_path, dataclasses.replace(EXACT, boxes_per_image=1)):
        assert len(case.boxes) == len(case.truth) == 1
    too_large = dataclasses.replace(EXACT, min_object_px=201)
    with pytest.raises(InputError, match="no object of at least 201 pixels in 1 files"):
        load_cases(tmp_path, too_large)


def test_each_side_of_a_box_grows_by_its_own_part_of_the_jitter_and_stays_inside(tmp_path):
    images, _ = two_objects(tmp_path / "a.npz")
    some = dataclasses.replace(EXACT, box_jitter_px=128)  # up to 5 pixels here
    boxes = np.stack([case.boxes[1] for case in load_cases(tmp_path, some)])
    grown = (boxes - [10, 5, 20, 25]) * [-1, -1, 1, 1]
    assert (grown >= 0).all()
    assert 3 < grown.max() <= 5
    assert len(np.unique(grown)) == grown.size == 16
    wide = dataclasses.replace(EXACT, box_jitter_px=1024)
    boxes = np.stack([case.boxes for case in load_cases(tmp_path, wide)])
    assert (boxes[..., :2].min(), boxes[..., 2].max(), boxes[..., 3].max()) == (0, 30, 40)
    alone = [read_case(tmp_path / "a.npz", at, images[at], some).boxes.tolist() for at in (1, 1, 2)]
    assert alone[0] == alone[1] != alone[2]


def test_shares_are_even_and_the_first_get_what_is_over():
    assert even_shares(7, [9, 1, 9]) == [3, 1, 3]
    assert even_shares(2, [9, 9, 9]) == [1, 1, 0]
    assert even_shares(9, [1, 2, 0]) == [1, 2, 0]
    assert even_shares(0, [3]) == [0]
