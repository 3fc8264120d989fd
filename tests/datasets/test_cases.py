"""Which files an evaluation reads, and what becomes of unusable ones."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.datasets.cases import CaseFile, read_case
from dbsam_deploy.datasets.finding import find_cases, read_split
from dbsam_deploy.verification.cases import bundled_examples

IMAGE = np.arange(216, dtype=np.uint8).reshape(8, 9, 3)


def write(path: Path, **arrays: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image, labels = IMAGE, np.ones((8, 9), np.uint8)
    for name in ("b/two.npz", "a/one.npz", "a/deep/three.npz", "four.npz"):
        write(tmp_path / "data" / name, imgs=image, gts=labels)
    return tmp_path / "data"


def test_tasks_are_folders(folder: Path) -> None:
    found = [(file.task, file.name) for file in find_cases(folder)]
    assert found == [
        ("a/deep", "a/deep/three.npz"),
        ("a", "a/one.npz"),
        ("b", "b/two.npz"),
        ("data", "four.npz"),
    ]


def test_one_file(folder: Path) -> None:
    (found,) = find_cases(folder / "a" / "one.npz")
    assert (found.task, found.name) == ("a", "one.npz")
    assert read_case(found).file_name == "one.npz"


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_a_subset_in_its_own_order(folder: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"split{suffix}"
    lists = {"train": ["a/one.npz"], "validation": ["four.npz", "b/two.npz"]}
    text = "\n".join(f"{name} = {json.dumps(files)}" for name, files in lists.items())
    path.write_text(json.dumps(lists) if suffix == ".json" else text)
    found = find_cases(folder, split=path, subset="validation")
    assert [file.name for file in found] == lists["validation"]


SPLITS = [
    ("{", "not a readable JSON or TOML"),
    ('{"validation": "a/one.npz"}', "expected lists of files"),
    ('["a/one.npz"]', "expected lists of files"),
    ('{"validation": [1]}', "expected lists of files"),
    ('{"train": ["a/one.npz"]}', "no subset 'validation'; it has train"),
    ('{"validation": []}', "lists no files"),
    ('{"validation": ["a/one.npz", "a/gone.npz"]}', "a/gone.npz is not in"),
    ('{"validation": ["../four.npz"]}', "relative to the data folder"),
    ('{"validation": ["/four.npz"]}', "relative to the data folder"),
    ('{"train": ["a/one.npz"], "validation": ["./a/one.npz"]}', "listed twice"),
]


@pytest.mark.parametrize(("text", "message"), SPLITS)
def test_an_unusable_split(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        find_cases(folder, split=tmp_path / "split.json", subset="validation")
    assert "split.json" in str(caught.value)


def test_split_and_subset_go_together(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="go together"):
        find_cases(folder, subset="validation")
    with pytest.raises(InputError, match="not a readable JSON"):
        read_split(tmp_path / "missing.json", "train")


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.npz files"):
        find_cases(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        find_cases(tmp_path / "missing")


def test_bundled_examples_with_their_names() -> None:
    cases = [read_case(file) for file in find_cases(bundled_examples())]
    assert len(cases) == 5
    heart = cases[0]
    assert (heart.task, heart.file_name) == ("examples", "MR_cardiac_LV_SC-HYP-38.npz")
    assert heart.label_names == {1: "left ventricle (endocardial)"}
    assert heart.labels.shape == heart.volume.shape == (18, 256, 256)
    assert cases[1].present(0) == sorted(cases[1].label_names)


LABELS = np.ones((8, 9), np.uint8)
DEAD_PIXEL = np.where(np.arange(72).reshape(8, 9) == 30, np.nan, 1.0)
UNUSABLE = {
    "no imgs": ({"gts": LABELS}, "no array `imgs`"),
    "no gts": ({"imgs": IMAGE}, "no array `gts`"),
    "empty mask": ({"imgs": IMAGE, "gts": 0 * LABELS}, "gts is 0 everywhere"),
    "negative label": ({"imgs": IMAGE, "gts": LABELS.astype(int) - 2}, "gts holds -1"),
    "another size": ({"imgs": IMAGE, "gts": LABELS[:7]}, "expected whole numbers of shape"),
    "fractions": ({"imgs": IMAGE, "gts": LABELS / 2}, "expected whole numbers"),
    "NaN image": ({"imgs": DEAD_PIXEL, "gts": LABELS}, "NaN or infinity"),
    "pickled labels": ({"imgs": IMAGE, "gts": np.array([[None]])}, "pickled"),
    "pickled images": ({"imgs": np.array([{}]), "gts": LABELS}, "pickled"),
    "names without values": (
        {"imgs": IMAGE, "gts": LABELS, "label_names": np.array(["a"])},
        "label_ids and label_names",
    ),
    "names of another number": (
        {"imgs": IMAGE, "gts": LABELS, "label_ids": [1, 2], "label_names": np.array(["a"])},
        "label_ids and label_names",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_file_is_named(tmp_path: Path, name: str) -> None:
    arrays, message = UNUSABLE[name]
    path = write(tmp_path / "broken.npz", **arrays)
    with pytest.raises(InputError, match=message) as caught:
        read_case(CaseFile(path, "task", "task/broken.npz"))
    assert str(path) in str(caught.value)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (marker,))  # type: ignore[return-value]

    path = tmp_path / "evil.npz"
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InputError, match=r"evil\.npz"):
        read_case(CaseFile(path, "task", "task/evil.npz"))
    assert not marker.exists()
