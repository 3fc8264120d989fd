"""Data sets become npz files: the same values, once, whole, and with a record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.labelled_sets import IMAGE, LABELS, write_nifti, write_seg, write_series

from dbsam_deploy import convert
from dbsam_deploy.cli import run
from dbsam_deploy.datasets.cases import read_case
from dbsam_deploy.datasets.finding import find_cases
from dbsam_deploy.images.npz_files import read_array

pytest.importorskip("nibabel")
pytest.importorskip("SimpleITK")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "Dataset009"
    for name in ("a", "b"):
        write_nifti(folder / "imagesTr" / f"{name}_0000.nii.gz", IMAGE)
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", LABELS)
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "tumour": 2}}
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


class Shell:
    """`convert` as a shell runs it: status, standard output, standard error."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: object) -> tuple[int, str, str]:
        self.capsys.readouterr()
        status = run(convert.main, [str(word) for word in words])
        return status, *self.capsys.readouterr()


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def test_what_an_npz_holds(dataset: Path, tmp_path: Path, shell: Shell) -> None:
    status, out, err = shell(dataset, tmp_path / "npz")
    assert (status, err) == (0, "")
    assert "2 converted, 0 kept as they were, 0 skipped" in out
    assert sorted(path.name for path in (tmp_path / "npz").rglob("*")) == [
        *("Dataset009", "a.npz", "b.npz", "conversion.json"),
    ]
    with np.load(tmp_path / "npz" / "Dataset009" / "a.npz") as content:  # no pickle in it
        arrays = {name: content[name] for name in content.files}
    np.testing.assert_array_equal(arrays["gts"], LABELS)
    assert (arrays["gts"].dtype, arrays["imgs"].dtype) == (np.uint8, np.uint8)
    expected = np.clip((IMAGE + 160.0) / 400 * 255, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(arrays["imgs"], expected)
    assert arrays["label_ids"].tolist() == [1, 2]
    assert arrays["label_names"].tolist() == ["liver", "tumour"]
    np.testing.assert_allclose(arrays["spacing"], [2.5, 0.8, 0.7])
    report = json.loads((tmp_path / "npz" / "conversion.json").read_text())
    record = report["cases"][0]
    assert record == json.loads(str(arrays["conversion"]))
    assert record["images"] == "imagesTr/a_0000.nii.gz"
    assert record["labels"] == "labelsTr/a.nii.gz"
    assert "window level 40 width 400" in record["intensity"]
    assert "soft-tissue" in record["notes"][0]


def test_both_are_read_alike(dataset: Path, tmp_path: Path, shell: Shell) -> None:
    shell(dataset, tmp_path / "npz")
    pairs = [
        (read_case(one), read_case(other))
        for one, other in zip(find_cases(dataset), find_cases(tmp_path / "npz"), strict=True)
    ]
    assert len(pairs) == 2
    for one, other in pairs:
        np.testing.assert_array_equal(one.volume.pixels, other.volume.pixels)
        np.testing.assert_array_equal(one.labels, other.labels)
        assert one.volume.spacing_mm == other.volume.spacing_mm
        assert (one.task, one.file_name) == (other.task, other.file_name)
        assert one.label_names == other.label_names


def test_a_dicom_tree(tmp_path: Path, shell: Shell) -> None:
    pytest.importorskip("highdicom")
    files = write_series(tmp_path / "lungs" / "p1" / "ct", IMAGE)
    write_seg(tmp_path / "lungs" / "p1" / "seg" / "1.dcm", files[::-1], LABELS[::-1])
    write_series(tmp_path / "lungs" / "p1" / "scout", IMAGE)  # left out, which is no fault
    assert shell(tmp_path / "lungs", tmp_path / "npz")[0] == 0
    case = read_case(find_cases(tmp_path / "npz")[0])
    assert case.name == "lungs/p1.npz"
    np.testing.assert_array_equal(case.labels, LABELS)
    assert case.label_names == {1: "liver", 2: "spleen"}


def test_the_same_command_again_makes_what_is_missing(
    dataset: Path, tmp_path: Path, shell: Shell
) -> None:
    shell(dataset, tmp_path / "npz")
    first, second = (tmp_path / "npz" / "Dataset009" / f"{name}.npz" for name in ("a", "b"))
    report = (tmp_path / "npz" / "conversion.json").read_bytes()
    before = first.stat().st_mtime_ns
    second.unlink()
    assert "1 converted, 1 kept" in shell(dataset, tmp_path / "npz")[1]
    assert first.stat().st_mtime_ns == before
    assert (tmp_path / "npz" / "conversion.json").read_bytes() == report
    write_nifti(dataset / "labelsTr" / "a.nii.gz", np.flip(LABELS, 2).copy())
    assert "1 converted, 1 kept" in shell(dataset, tmp_path / "npz")[1]
    np.testing.assert_array_equal(np.load(first)["gts"], np.flip(LABELS, 2))
    assert "2 converted, 0 kept" in shell(dataset, tmp_path / "npz", "--window", 0, 100)[1]
    assert "level 0 width 100" in str(read_array(first, "conversion", 10_000))


def test_the_rest_goes_on_and_the_report_says_why(
    dataset: Path, tmp_path: Path, shell: Shell
) -> None:
    write_nifti(dataset / "labelsTr" / "a.nii.gz", LABELS, origin=(9.0, 9.0, 9.0))
    write_nifti(dataset / "labelsTr" / "c.nii.gz", LABELS)
    status, out, err = shell(dataset, tmp_path / "npz")
    assert (status, err) == (1, "")
    assert "1 converted, 0 kept as they were, 2 skipped" in out
    report = json.loads((tmp_path / "npz" / "conversion.json").read_text())
    reasons = {one["path"]: one["why"] for one in report["skipped"]}
    assert reasons["labelsTr/c.nii.gz"] == "has no image of its name"
    assert "mm beside its images" in reasons["imagesTr/a_0000.nii.gz"]
    assert [case["npz"] for case in report["cases"]] == ["Dataset009/b.npz"]


def test_what_is_in_the_way_stays(dataset: Path, tmp_path: Path, shell: Shell) -> None:
    mine = tmp_path / "npz" / "Dataset009" / "a.npz"
    mine.parent.mkdir(parents=True)
    np.savez(mine, imgs=IMAGE)
    before = mine.read_bytes()
    status, out, _ = shell(dataset, tmp_path / "npz")
    assert (status, mine.read_bytes()) == (1, before)
    assert "was not made by `convert`" in out


def test_a_killed_run_leaves_nothing_half(
    dataset: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def interrupt(path: Path, content: bytes) -> Path:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, content)

    from dbsam_deploy.datasets import conversion

    write = conversion.write_file
    monkeypatch.setattr(conversion, "write_file", interrupt)
    assert shell(dataset, tmp_path / "npz")[0] == 130
    assert [path for path in (tmp_path / "npz").rglob("*") if path.is_file()] == written
    monkeypatch.undo()
    assert "1 converted, 1 kept" in shell(dataset, tmp_path / "npz")[1]


MISTAKES = {
    "inside": ("{data}", "{data}/npz", "choose a folder outside it"),
    "npz": ("{npz}", "{out}", "there is nothing to convert"),
    "empty": ("{empty}", "{out}", "no labelled images; expected"),
    "window": ("{data} --window 40 -1", "{out}", "expected a finite level and a width > 0"),
    "missing": ("{data}/missing", "{out}", "no such folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(dataset: Path, tmp_path: Path, shell: Shell, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "old").mkdir()
    np.savez(tmp_path / "old" / "x.npz", imgs=LABELS, gts=LABELS)
    places = {
        "data": dataset, "out": tmp_path / "out", "empty": tmp_path / "empty",
        "npz": tmp_path / "old",
    }  # fmt: skip
    source, output, message = MISTAKES[name]
    status, out, err = shell(*source.format(**places).split(), output.format(**places))
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
