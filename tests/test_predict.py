"""The command line on real ONNX graphs: every kind of file in, masks out, mistakes in one line."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.dicom_series import rotation, write_dicom_series

from dbsam_deploy import predict
from dbsam_deploy.artefact import Artefact, write_artefact
from dbsam_deploy.cli import run
from dbsam_deploy.images.volumes import png_bytes
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession

EXAMPLES = Path(__file__).resolve().parent.parent / "export" / "examples"


class Command:
    """Runs `main` as the shell would, on the test graphs."""

    def __init__(self, artefact: Artefact, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.artefact, self.output, self.capsys = artefact, folder / "out", capsys

    def __call__(self, image: Path, *options: object) -> str:
        status, out, err = self.run(image, *options)
        assert (status, err) == (0, "")
        return out

    def run(self, image: Path, *options: object) -> tuple[int, str, str]:
        named = () if "pytorch" in options else ("--artefact", self.artefact.folder)
        words = [image, "--output", self.output, *named, *options]
        self.capsys.readouterr()
        status = run(predict.main, [str(word) for word in words])
        out, err = self.capsys.readouterr()
        return status, out, err

    def masks(self, image: np.ndarray, boxes: Any) -> np.ndarray:
        """What the library gives without files: (N, H, W)."""
        predictor = Predictor(OnnxRuntimeSession(self.artefact), self.artefact.preprocessing)
        predictor.set_image(image)
        return predictor.predict_boxes(np.array(boxes)).masks[:, 0]

    def label_map(self, image: np.ndarray, boxes: Any) -> np.ndarray:
        labels = np.zeros(image.shape[:2], np.uint8)
        for label, mask in enumerate(self.masks(image, boxes), start=1):
            labels[mask == 1] = label
        return labels


@pytest.fixture
def command(tiny_artefact: Artefact, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tiny_artefact, tmp_path, capsys)


def grey3(plane: np.ndarray) -> np.ndarray:
    return np.repeat(plane[..., None], 3, axis=2)


def blocks(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Coarse random structure, so that masks are neither empty nor everything."""
    small = rng.integers(0, 256, [-(-side // 8) for side in shape], dtype=np.uint8)
    for axis in range(len(shape)):
        small = np.repeat(small, 8, axis)
    return small[tuple(slice(side) for side in shape)].copy()


def test_png(command: Command, tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = blocks(rng, 70, 101, 3)
    Image.fromarray(pixels).save(tmp_path / "skin.png")
    boxes = [[10, 12, 60, 50], [40, 20, 101, 70]]
    out = command(tmp_path / "skin.png", "--box", *boxes[0], "--box", *boxes[1], "--overlay")
    expected = command.label_map(pixels, boxes)
    assert set(np.unique(expected)) == {0, 1, 2}
    with Image.open(command.output / "skin_mask.png") as image:
        np.testing.assert_array_equal(np.asarray(image), expected)
    with np.load(command.output / "skin_mask.npz") as saved:
        np.testing.assert_array_equal(saved["segs"], expected)
        assert saved["segs"].dtype == np.uint8
        assert saved["iou_predictions"].shape == (2,)
    with Image.open(command.output / "skin_overlay.png") as image:
        assert image.mode == "RGB"
        assert image.width >= 900
    assert sorted(p.name for p in command.output.iterdir()) == [
        "skin_mask.npz",
        "skin_mask.png",
        "skin_overlay.png",
    ]
    counts = [int(mask.sum()) for mask in command.masks(pixels, boxes)]
    for words in ("box 10 12 60 50", "0–255 as stored", *map(str, counts)):
        assert words in out
    assert "NOTE: test graphs" in out  # the weights say that they are untrained


def test_a_picture_is_the_same_mask_as_its_npz(
    command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    pixels = blocks(rng, 40, 50)
    (tmp_path / "a.png").write_bytes(png_bytes(pixels))
    np.savez(tmp_path / "b.npz", imgs=pixels[None])
    for name in ("a.png", "b.npz"):
        command(tmp_path / name, "--box", 5, 5, 45, 35)
    with np.load(command.output / "a_mask.npz") as a, np.load(command.output / "b_mask.npz") as b:
        np.testing.assert_array_equal(a["segs"], b["segs"])
        np.testing.assert_array_equal(a["segs"], command.label_map(grey3(pixels), [[5, 5, 45, 35]]))


def test_npz_2d_with_its_own_boxes(
    command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    pixels, boxes = blocks(rng, 40, 50, 3), np.array([[1, 2, 30, 30], [5, 5, 50, 40]])
    np.savez(tmp_path / "2D.npz", imgs=pixels, boxes=boxes)
    command(tmp_path / "2D.npz")
    with np.load(command.output / "2D_mask.npz") as saved:
        np.testing.assert_array_equal(saved["segs"], command.label_map(pixels, boxes))


def test_npz_3d_with_its_own_boxes(
    command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    imgs = blocks(rng, 6, 40, 50)
    boxes = np.array([[1, 2, 1, 30, 30, 2], [5, 5, 2, 50, 40, 5]])
    spacing = np.array([5, 0.7, 0.8])
    np.savez(tmp_path / "3D.npz", imgs=imgs, boxes=boxes, spacing=spacing)
    command(tmp_path / "3D.npz", "--overlay", "--no-propagate")
    expected = np.zeros(imgs.shape, np.uint8)
    for z in range(6):
        # the file's z_max is the last slice
        here = [(i + 1, b) for i, b in enumerate(boxes) if b[2] <= z <= b[5]]
        for label, box in here:
            (mask,) = command.masks(grey3(imgs[z]), [box[[0, 1, 3, 4]]])
            expected[z][mask == 1] = label
    with np.load(command.output / "3D_mask.npz") as saved:
        np.testing.assert_array_equal(saved["segs"], expected)
        np.testing.assert_array_equal(saved["spacing"], spacing)
    assert sorted(p.name for p in command.output.iterdir()) == ["3D_mask.npz", "3D_overlay.png"]


def test_a_colour_stack(command: Command, tmp_path: Path, rng: np.random.Generator) -> None:
    imgs = blocks(rng, 3, 40, 50, 3)
    np.savez(tmp_path / "stack.npz", imgs=imgs)
    command(tmp_path / "stack.npz", "--slice", 2, "--box", 5, 5, 45, 35)
    with np.load(command.output / "stack_mask.npz") as saved:
        assert saved["segs"].shape == (3, 40, 50)
        assert not saved["segs"][:2].any()
        np.testing.assert_array_equal(
            saved["segs"][2], command.label_map(imgs[2], [[5, 5, 45, 35]])
        )


def test_points_and_multimask(command: Command, tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = blocks(rng, 40, 50, 3)
    (tmp_path / "a.png").write_bytes(png_bytes(pixels))
    out = command(
        tmp_path / "a.png", "--point", 20, 20, 1, "--point", 2, 3, 0, "--box", 5, 5, 45, 35,
        "--multimask", "--overlay",
    )  # fmt: skip
    predictor = Predictor(OnnxRuntimeSession(command.artefact), command.artefact.preprocessing)
    predictor.set_image(pixels)
    expected = predictor.predict_prompts(
        boxes=np.array([[5, 5, 45, 35]]),
        point_coords=np.array([[[20, 20], [2, 3]]]),
        point_labels=np.array([[1, 0]]),
        multimask=True,
    )
    with np.load(command.output / "a_mask.npz") as saved:
        np.testing.assert_array_equal(saved["alternatives"], expected.masks[0])
        best = int(expected.ious[0].argmax())
        np.testing.assert_array_equal(saved["segs"], expected.masks[0, best])
    assert out.count("alternative") == 3
    assert len(re.findall(r"│ no ", out)) == 2


def test_nifti_keeps_its_geometry(
    command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    nib = pytest.importorskip("nibabel")
    affine = np.eye(4)
    affine[:3, :3] = rotation(12, -23, 31) @ np.diag([0.7, -0.9, 2.5])
    affine[:3, 3] = [-91.25, 33.5, 1042.75]
    array = blocks(rng, 50, 40, 6).astype(np.int16) * 8 - 1000  # x, y, z
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "ct.nii.gz")
    box = (5, 4, 1, 45, 30, 4)
    flags = ("--box3d", *box, "--window", 40, 1200, "--no-propagate")
    out = command(tmp_path / "ct.nii.gz", *flags)
    assert "window level 40 width 1200 (-560 to 640)" in out
    saved = nib.load(command.output / "ct_mask.nii.gz")
    np.testing.assert_array_equal(saved.affine, nib.load(tmp_path / "ct.nii.gz").affine)
    shown = ((np.clip(array, -560, 640) + 560) / 1200 * 255).astype(np.uint8)
    expected = np.zeros(array.shape, np.uint8)
    for z in (1, 2, 3):
        (mask,) = command.masks(grey3(shown[:, :, z].T), [[5, 4, 45, 30]])
        expected[:, :, z] = mask.T
    assert 0 < expected.sum() < expected.size / 2
    np.testing.assert_array_equal(np.asarray(saved.dataobj), expected)


def test_dicom_series_gives_nifti_in_place(
    command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    nib = pytest.importorskip("nibabel")
    pytest.importorskip("pydicom")
    volume = blocks(rng, 5, 40, 50).astype(int) * 8 - 1000
    files = write_dicom_series(tmp_path / "ct", volume, directions=rotation(5, 10, 15))
    flags = ("--box3d", 5, 4, 1, 45, 30, 4, "--window", 40, 1200, "--no-propagate")
    command(tmp_path / "ct", *flags, "--overlay")
    saved = nib.load(command.output / "ct_mask.nii.gz")
    shown = ((np.clip(volume, -560, 640) + 560) / 1200 * 255).astype(np.uint8)
    (mask,) = command.masks(grey3(shown[2]), [[5, 4, 45, 30]])
    np.testing.assert_array_equal(np.asarray(saved.dataobj)[:, :, 2], mask.T)
    corner = rotation(5, 10, 15) @ [0, 0, 2 * 2.5] + [-100, -80, 30]
    place = (saved.affine @ [0, 0, 2, 1])[:3]
    np.testing.assert_allclose(place, corner * [-1, -1, 1], atol=1e-3)
    # the same slice from its own file, as npz
    command(files[2], "--box", 5, 4, 45, 30, "--window", 40, 1200, "--format", "npz")
    with np.load(command.output / f"{files[2].stem}_mask.npz") as alone:
        np.testing.assert_array_equal(alone["segs"], mask)


def test_a_dicom_series_is_chosen_and_said(
    command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    pytest.importorskip("nibabel")
    pytest.importorskip("pydicom")
    volume = blocks(rng, 3, 40, 50).astype(int) * 8 - 1000
    own = {"WindowCenter": "40.5", "WindowWidth": "1201"}
    write_dicom_series(tmp_path / "ct" / "a", volume, SeriesNumber=1, **own)
    write_dicom_series(tmp_path / "ct" / "b", volume, SeriesNumber=2)
    (tmp_path / "ct" / "README.txt").write_text("two series")
    box = ("--box3d", 5, 4, 0, 45, 30, 3)
    out = command(tmp_path / "ct", "--series", 1, "--window", "file", *box)
    assert "intensities: the file's own window level 40.5 width 1201" in out
    assert "NOTE: passed over, since they hold no slices: README.txt" in out
    assert "soft-tissue window" in command(tmp_path / "ct", "--series", 2, "--overwrite", *box)


def test_medsam_preprocessing_can_be_chosen(
    command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    pytest.importorskip("skimage")
    (tmp_path / "a.png").write_bytes(png_bytes(blocks(rng, 40, 90, 3)))
    out = command(tmp_path / "a.png", "--box", 20, 5, 85, 35, "--preprocess", "medsam")
    assert "medsam at 128 pixels" in out
    first = (command.output / "a_mask.png").read_bytes()
    out = command(tmp_path / "a.png", "--box", 20, 5, 85, 35)
    assert "sam at 128 pixels" in out
    assert (command.output / "a_mask.png").read_bytes() != first


def test_pytorch_backend_on_a_real_example(command: Command) -> None:
    example = EXAMPLES / "MR_cardiac_LV_SC-HYP-38.npz"
    out = command(
        example, "--slice", 4, "--box", 90, 90, 180, 180, "--overlay",
        "--backend", "pytorch", "--variant", "db_sam_tiny", "--image-size", 256,
    )  # fmt: skip
    assert "pytorch-cpu, sam at 256 pixels" in out
    assert "untrained" not in out
    with np.load(command.output / "MR_cardiac_LV_SC-HYP-38_mask.npz") as saved:
        assert saved["segs"].shape == (18, 256, 256)
        assert not np.delete(saved["segs"], 4, axis=0).any()
        shown = re.search(r"│ 1 .*?│ (\d+) +│", out)
        assert shown is not None
        assert int(saved["segs"][4].sum()) == int(shown.group(1))


@pytest.fixture(scope="module")
def mistake_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that are wrong, and of good ones; not to be changed."""
    folder = tmp_path_factory.mktemp("mistakes")
    pixels = blocks(np.random.default_rng(0), 40, 50, 3)
    good = png_bytes(pixels)
    (folder / "good.png").write_bytes(good)
    (folder / "cut.png").write_bytes(good[:-200])
    (folder / "text.png").write_text("no picture")
    np.savez(folder / "volume.npz", imgs=pixels[..., 0][None].repeat(4, 0))
    np.savez(folder / "pickled.npz", imgs=np.array([{"a": 1}], object))
    np.savez(folder / "other.npz", image=pixels)
    dead_pixel = pixels.astype(np.float32)
    dead_pixel[7, 8, 1] = np.nan
    np.savez(folder / "nan.npz", imgs=dead_pixel)
    bomb = np.broadcast_to(np.uint8(0), (1, 9000, 9000))
    np.savez_compressed(folder / "bomb.npz", imgs=bomb)
    (folder / "empty").mkdir()
    return folder


MISTAKES = {
    "no file": ("nothing.png --box 1 2 30 30", "no such file"),
    "cut picture": ("cut.png --box 1 2 30 30", "not a readable PNG"),
    "no picture": ("text.png --box 1 2 30 30", "not a readable PNG"),
    "pickled npz": ("pickled.npz --box 1 2 30 30", "pickled Python objects"),
    "zip bomb": ("bomb.npz --box 1 2 30 30", "at most"),
    "npz without imgs": ("other.npz --box 1 2 30 30", "no array `imgs`"),
    "nan image": ("nan.npz --box 1 2 30 30", "NaN or infinity"),
    "empty folder": ("empty --box 1 2 30 30", "no DICOM file"),
    "no prompt": ("good.png", "no prompt"),
    "box outside": ("good.png --box 1 2 51 30", "outside the image"),
    "box of wrong order": ("good.png --box 30 2 1 30", "x0 < x1"),
    "nan box": ("good.png --box 1 2 nan 30", "finite"),
    "negative box": ("good.png --box -1 2 30 30", "outside the image"),
    "point outside": ("good.png --point 51 2 1", "outside the image"),
    "point label": ("good.png --point 5 2 7", "point labels"),
    "volume without slice": ("volume.npz --box 1 2 30 30", "--slice"),
    "slice outside": ("volume.npz --box 1 2 30 30 --slice 4", "slices 0–3"),
    "3D box outside": ("volume.npz --box3d 1 2 0 30 30 5", "z1 <= 4"),
    "3D box on an image": ("good.png --box3d 1 2 0 30 30 1", "2D image"),
    "window": ("good.png --box 1 2 30 30 --window 40 0", "width > 0"),
    "nifti of a picture": ("good.png --box 1 2 30 30 --format nifti", "position in space"),
    "pytorch option": ("good.png --box 1 2 30 30 --variant db_sam", "--backend pytorch"),
    "no such device": ("good.png --box 1 2 30 30 --backend tensorrt --device cpu", "runs on cuda"),
    "no artefact": ("good.png --box 1 2 30 30 --artefact {folder}/empty", "no manifest.json"),
    "unknown variant": ("good.png --box 1 2 30 30 --backend pytorch --variant x", "x"),
    "three numbers": ("good.png --box 1 2 30", "expected 4 arguments"),
    "a word as number": ("good.png --box 1 2 30 x", "invalid float"),
    "unknown option": ("good.png --boxes 1 2 30 30", "unrecognized arguments"),
    "output is a file": ("good.png --box 1 2 30 30 --output {folder}/good.png", "cannot be"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_status_2_and_one_line(
    command: Command, mistake_files: Path, name: str
) -> None:
    words, message = MISTAKES[name]
    image, *options = words.format(folder=mistake_files).split()
    status, _, err = command.run(mistake_files / image, *options)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not command.output.exists()


def test_the_input_is_never_overwritten(
    command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes(blocks(rng, 40, 50, 3)))
    command.output.mkdir()
    os.link(tmp_path / "a.png", command.output / "a_mask.png")
    before = (tmp_path / "a.png").read_bytes()
    status, _, err = command.run(tmp_path / "a.png", "--box", 1, 2, 30, 30)
    assert status == 2
    assert "is the input itself" in err
    assert (tmp_path / "a.png").read_bytes() == before
    assert len(list(command.output.iterdir())) == 1


def test_trained_weights_carry_no_note(
    command: Command, tmp_path: Path, rng: np.random.Generator, make_artefact: Any
) -> None:
    made = make_artefact(tmp_path / "trained")
    weights = {"trained": True, "note": "loaded from somewhere"}
    write_artefact(dataclasses.replace(made, weights=weights))
    (tmp_path / "a.png").write_bytes(png_bytes(blocks(rng, 40, 50, 3)))
    out = command(tmp_path / "a.png", "--box", 1, 2, 30, 30, "--artefact", made.folder)
    assert "NOTE" not in out


def test_the_module_runs_as_a_command(command: Command, tmp_path: Path) -> None:
    def shell(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dbsam_deploy.predict", *map(str, words)],
            capture_output=True,
            text=True,
            cwd=EXAMPLES.parent.parent,
            check=False,
        )

    shown = shell("--help")
    assert shown.returncode == 0
    assert "--box3d" in shown.stdout
    assert "examples:" in shown.stdout
    assert "(default: None)" not in shown.stdout
    failed = shell(tmp_path / "nothing.png", "--box", 1, 2, 3, 4)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr == f"error: {tmp_path / 'nothing.png'}: no such file or folder\n"
    done = shell(
        EXAMPLES / "Microscopy_nuclei_HE_01d44a26f668.npz", "--box", 20, 20, 200, 180,
        "--artefact", command.artefact.folder, "--output", command.output,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (command.output / "Microscopy_nuclei_HE_01d44a26f668_mask.png").is_file()
