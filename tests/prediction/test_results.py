"""A result as files, pictures and tables."""

import base64
import io
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.dicom_series import rotation

import dbsam_deploy as db
from dbsam_deploy.core.errors import InputError


@pytest.fixture
def model(tiny_artefact) -> db.Model:
    return db.load(tiny_artefact.folder)


@pytest.fixture
def picture(tmp_path) -> Path:
    coarse = np.random.default_rng().integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)).save(tmp_path / "a & b.png")
    return tmp_path / "a & b.png"


@pytest.fixture
def result(model, picture) -> db.Result:
    return model.predict(picture, boxes=[[5, 6, 40, 30], [20, 10, 60, 45]])


def test_png_and_npz_hold_the_label_map(result, tmp_path):
    assert result.save(tmp_path / "x" / "mask.png") == tmp_path / "x" / "mask.png"
    with Image.open(tmp_path / "x" / "mask.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), result.labels[0])
    with np.load(result.save(str(tmp_path / "mask.NPZ"))) as saved:
        np.testing.assert_array_equal(saved["segs"], result.labels[0])
        np.testing.assert_array_equal(saved["iou_predictions"], result.ious[:, 0])


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_nifti_stays_in_place(model, tmp_path, suffix):
    nib = pytest.importorskip("nibabel")
    affine = np.eye(4)
    affine[:3, :3] = rotation(12, -23, 31) @ np.diag([0.7, -0.9, 2.5])
    values = np.random.default_rng().integers(-500, 500, (40, 32, 4), dtype=np.int16)
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "ct.nii.gz")
    scan = db.read_image(str(tmp_path / "ct.nii.gz"), window=(40, 400))
    result = model.segment(scan, boxes_3d=[[3, 4, 1, 30, 28, 3]])
    saved = nib.load(result.save(tmp_path / f"mask{suffix}"))
    np.testing.assert_array_equal(np.asarray(saved.dataobj).transpose(2, 1, 0), result.labels)
    np.testing.assert_array_equal(saved.affine, nib.load(tmp_path / "ct.nii.gz").affine)


def test_what_cannot_be_saved_says_why(model, result, picture, tmp_path):
    stack = np.random.default_rng().integers(0, 256, (3, 40, 40, 1), dtype=np.uint8)
    volume = model.segment(stack, boxes_3d=[[3, 4, 0, 30, 28, 3]])
    for each, name, message in (
        (result, "mask.tif", "unknown ending"),
        (result, "mask", "unknown ending"),
        (result, "mask.nii.gz", "no position in space"),
        (volume, "mask.png", "one slice"),
    ):
        with pytest.raises(InputError, match=message):
            each.save(tmp_path / "new" / name)
    before = picture.read_bytes()
    with pytest.raises(InputError, match="is the input itself"):
        result.save(picture)
    assert picture.read_bytes() == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("stem", ["m" * 300, "mask\0"])
def test_a_name_that_no_file_can_have_is_one_error(result, tmp_path, stem):
    with pytest.raises(InputError, match="cannot be written"):
        result.save(tmp_path / f"{stem}.png")


def test_the_picture_shows_contours_and_prompts(result, picture):
    shown = np.asarray(result.plot())
    assert shown.shape[1] >= 900
    first, second = (230, 159, 0), (86, 180, 233)
    for colour in (first, second):
        assert (shown == colour).all(-1).sum() > 100
    assert result.note
    assert replace(result, note="").plot().height < len(shown)  # a line less under the legend


def test_a_notebook_shows_the_picture_and_a_safe_table(result):
    page = result._repr_html_()
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(result.plot()))
    assert "a &amp; b.png" in page
    assert "a & b.png" not in page
    for row in result.rows():
        assert f"<td>{row.label}</td><td>{row.prompt}</td><td>{row.pixels}</td>" in page


def test_a_notebook_takes_a_file_name_that_is_no_utf8(result):
    named = replace(result, image=replace(result.image, path=Path(os.fsdecode(b"\xff<b>.png"))))
    assert "masks on ?&lt;b&gt;.png" in named._repr_html_().encode("utf-8").decode("utf-8")


def test_alternatives_are_all_listed_and_one_is_kept(model, picture):
    result = model.predict(picture, points=[[20, 18]], multimask=True)
    assert [row.kept for row in result.rows()].count(True) == 1
    best = int(result.ious[0].argmax())
    np.testing.assert_array_equal(result.labels[0], result.masks[0, best])
    assert [row.pixels for row in result.rows()] == result.masks[0].sum((1, 2)).tolist()
    assert repr(result).startswith("Result(1×48×64, points +(20, 18): ")


def test_unpacking_is_for_one_prompt(model, result, picture):
    with pytest.raises(InputError, match="2 prompts"):
        masks, ious, logits = result
    with pytest.raises(InputError, match="cannot be unpacked"):
        masks, ious, logits = model.segment(picture, boxes=[[5, 6, 40, 30]])  # labels alone
    alone = model.predict(picture, boxes=[[5, 6, 40, 30]])
    masks, ious, logits = alone
    assert (masks.shape, ious.shape) == ((1, 48, 64), (1,))
    np.testing.assert_array_equal(logits, alone.logits[0])
