"""Which files a segmentation is written to, and what is in them."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.dicom_series import write_dicom_series
from support.faults import Faults, Killed, injected, no_waiting

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.intensity import to_uint8
from dbsam_deploy.images.npz_files import read_label_names
from dbsam_deploy.images.volumes import Volume, read_image
from dbsam_deploy.outputs.files import own_formats, planned, write
from dbsam_deploy.outputs.segmentation import Segmentation, SegmentedObject


def volume_of(shape: tuple[int, int, int], folder: Path, kind: str = "npz") -> Volume:
    pixels, intensity = to_uint8(np.arange(np.prod(shape)).reshape(shape), None, Path("scan.npz"))
    return Volume(folder / "scan.npz", kind, pixels, intensity, spacing_mm=(3.0, 2.0, 1.0))


def segmented(volume: Volume, labels: np.ndarray) -> Segmentation:
    names = ("liver", "left kidney")
    objects = tuple(SegmentedObject(label, name) for label, name in enumerate(names, 1))
    confidence = np.full((2, len(labels)), np.nan, np.float32)
    confidence[0, 1:3] = 0.5, 0.7
    return Segmentation(volume, labels, objects, confidence, "toy")


def test_a_stack_without_a_grid_gets_no_nifti(tmp_path: Path) -> None:
    """Not even where the format is left to the program, which would write npz without a word."""
    pytest.importorskip("pydicom")
    write_dicom_series(tmp_path / "ct", np.arange(60).reshape(3, 4, 5), step=(0, 2, 5))
    volume = read_image(tmp_path / "ct", window=(30, 60))
    for formats in ((), ("nifti",)):
        with pytest.raises(InputError, match=r"sheared by 21\.8° .*--format npz"):
            planned(volume, formats, tmp_path)
    assert planned(volume, ["npz"], tmp_path) == {"npz": tmp_path / "ct_mask.npz"}


def test_formats_follow_the_input(tmp_path: Path) -> None:
    assert own_formats(volume_of((1, 4, 5), tmp_path)) == ("png", "npz")
    volume = volume_of((3, 4, 5), tmp_path)
    assert own_formats(volume) == ("npz",)
    plan = planned(volume, ("png", "npz", "png"), tmp_path / "out", overlay=True)
    assert plan == {
        "png": tmp_path / "out" / "scan_mask",
        "npz": tmp_path / "out" / "scan_mask.npz",
        "overlay": tmp_path / "out" / "scan_overlay.png",
    }
    assert planned(volume, ["npz"], tmp_path, "a") == {"npz": tmp_path / "a_mask.npz"}
    with pytest.raises(InputError, match=r"format 'tiff': expected one of nifti, npz, png"):
        planned(volume, ["tiff"], tmp_path)


def test_an_input_is_never_planned_as_output(tmp_path: Path) -> None:
    (tmp_path / "scan_mask.npz").write_bytes(b"")
    pixels, intensity = to_uint8(np.arange(8).reshape(1, 2, 4), None, Path("a"))
    files = (tmp_path / "scan_mask.npz",)
    volume = Volume(tmp_path / "scan.npz", "npz", pixels, intensity, files=files)
    with pytest.raises(InputError, match=r"scan_mask\.npz is the input itself"):
        planned(volume, ["npz"], tmp_path)


def test_slices_and_arrays_are_the_label_map(tmp_path: Path, rng: np.random.Generator) -> None:
    labels = rng.integers(0, 3, (4, 5, 6), np.uint8)
    segmentation = segmented(volume_of((4, 5, 6), tmp_path), labels)
    plan = planned(segmentation.image, ("npz", "png"), tmp_path / "new" / "out")
    assert write(segmentation, plan) == tuple(plan.values())
    read = [np.asarray(Image.open(plan["png"] / f"{z:03d}.png")) for z in range(4)]
    assert np.array_equal(read, labels)
    with np.load(plan["npz"]) as arrays:
        assert np.array_equal(arrays["segs"], labels)
        assert arrays["spacing"].tolist() == [3, 2, 1]
        np.testing.assert_allclose(arrays["iou_predictions"], [0.6, 0], rtol=1e-6)
        assert np.array_equal(arrays["confidence"], segmentation.confidence, equal_nan=True)
    assert read_label_names(plan["npz"]) == {1: "liver", 2: "left kidney"}
    assert sorted(path.name for path in plan["npz"].parent.iterdir()) == [
        "scan_mask",
        plan["npz"].name,
    ]


def test_slices_are_replaced_as_a_whole_and_nothing_else_is(tmp_path: Path) -> None:
    volume = volume_of((3, 4, 5), tmp_path)
    folder = planned(volume, ["png"], tmp_path)["png"]
    folder.mkdir()
    (folder / "007.png").write_bytes(b"of an earlier volume")
    labels = np.ones((3, 4, 5), np.uint8)
    write(segmented(volume, labels), {"png": folder})
    assert sorted(path.name for path in folder.iterdir()) == ["000.png", "001.png", "002.png"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'notes\.txt'"):
        write(segmented(volume, labels), {"png": folder})
    assert (folder / "notes.txt").read_text() == "mine"


def test_nothing_is_replaced_before_the_slices_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = volume_of((3, 4, 5), tmp_path)
    plan = planned(volume, ["npz", "png"], tmp_path)
    write(segmented(volume, np.ones((3, 4, 5), np.uint8)), plan)
    before = below(tmp_path)

    def full(*_: object) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dbsam_deploy.outputs.files.png_bytes", full)
    with pytest.raises(InputError, match="scan_mask cannot be written: No space left"):
        write(segmented(volume, np.full((3, 4, 5), 2, np.uint8)), plan)
    assert below(tmp_path) == before


def below(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("error", [errno.ENOSPC, 0])
def test_a_full_disk_or_a_kill_at_any_write_leaves_whole_results(
    error: int, every: int, tmp_path: Path
) -> None:
    volume = volume_of((3, 4, 5), tmp_path, "array")
    ones, twos = (segmented(volume, np.full((3, 4, 5), n, np.uint8)) for n in (1, 2))
    plan = planned(volume, ["npz", "csv", "png"], tmp_path / "out")
    write(twos, plan)
    new = below(tmp_path / "out")
    write(ones, plan)
    old = below(tmp_path / "out")
    with injected(Faults()) as faults:
        write(twos, plan)
        write(ones, plan)
    assert old.keys() == new.keys()
    said: list[str] = []
    for at in faults.points()[::every]:
        with injected(Faults(at, error, lasting=True)):
            try:
                write(twos, plan)
            except InputError as refusal:
                said.append(refusal.message)
            except Killed:
                said.append("killed")
        found = below(tmp_path / "out")
        for name in old:
            moved = f".{name.replace('/', '.old/')}"  # put back by the next run
            assert found.get(name, found.get(moved)) in (old[name], new[name]), (at, name)
        slices = {found.get(name) == new[name] for name in old if name.startswith("scan_mask/")}
        assert len(slices) == 1, "slices of two results"
        with no_waiting():
            write(ones, plan)
        assert below(tmp_path / "out") == old
    assert said
    expected = os.strerror(errno.ENOSPC) if error else "killed"
    assert all(expected in line for line in said)
