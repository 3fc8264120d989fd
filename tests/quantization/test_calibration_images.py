"""Calibration images: seeded, spread, each once, real; and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.quantization.calibration_images import choose_images, read_images
from dbsam_deploy.recipe import CalibrationPlan
from dbsam_deploy.verification.cases import bundled_examples

PLAN = CalibrationPlan("max", 99.9, images=6, held_back=2, seed=0)


@pytest.fixture
def stack():
    """(18, 256, 256) cardiac MR."""
    (path,) = bundled_examples().glob("MR_*.npz")
    return np.load(path)["imgs"]


@pytest.fixture
def folder(tmp_path, stack):
    """One npz stack, a NIfTI volume, two PNGs and a JPEG, with sub-folders."""
    nibabel = pytest.importorskip("nibabel")
    (tmp_path / "a").mkdir()
    np.savez(tmp_path / "a" / "stack.npz", imgs=stack[:4])
    volume = nibabel.Nifti1Image(stack[4:8].transpose(2, 1, 0).astype(np.float32), np.eye(4))
    nibabel.save(volume, tmp_path / "volume.nii.gz")
    Image.fromarray(stack[8]).save(tmp_path / "one.png")
    Image.fromarray(stack[9]).save(tmp_path / "two.PNG")
    Image.fromarray(stack[10]).save(tmp_path / "three.jpeg")
    return tmp_path


def test_images_are_spread_over_files_and_kinds(folder):
    chosen = choose_images(folder, PLAN)
    every = (*chosen.images, *chosen.held_back)
    assert (len(chosen.images), len(chosen.held_back)) == (6, 2)
    assert len({image.sha256 for image in every}) == 8
    assert len({image.file for image in chosen.images}) >= 3
    assert not {i.file for i in chosen.images} & {i.file for i in chosen.held_back}


def test_the_same_seed_chooses_the_same_and_another_one_others(folder):
    assert choose_images(folder, PLAN) == choose_images(folder, PLAN)
    other = [choose_images(folder, replace(PLAN, seed=seed)) for seed in range(1, 5)]
    assert any(found.images != choose_images(folder, PLAN).images for found in other)


def test_repeated_and_blank_slices_are_passed_over(tmp_path, stack):
    np.savez(tmp_path / "a.npz", imgs=stack[:6])
    np.savez(tmp_path / "b.npz", imgs=np.concatenate([stack[:6], np.zeros_like(stack[:3])]))
    with pytest.raises(InputError, match="6 different images in 2 files; the recipe wants 6"):
        choose_images(tmp_path, PLAN)
    np.savez(tmp_path / "c.npz", imgs=stack[6:10])
    chosen = choose_images(tmp_path, PLAN)
    assert len({i.sha256 for i in (*chosen.images, *chosen.held_back)}) == 8


def test_one_file_is_split_by_slices(tmp_path, stack):
    np.savez(tmp_path / "a.npz", imgs=stack)
    chosen = choose_images(tmp_path, PLAN)
    slices = {i.slice for i in chosen.images}
    assert len(slices) == 6
    assert not slices & {i.slice for i in chosen.held_back}


@pytest.mark.parametrize("kind", ["npz", "nii.gz", "nii"])
def test_one_file_may_be_named_without_its_folder(tmp_path, stack, kind):
    path = tmp_path / f"stack.{kind}"
    Image.fromarray(stack[0]).save(tmp_path / "another.png")
    if kind == "npz":
        np.savez(path, imgs=stack)
    else:
        nibabel = pytest.importorskip("nibabel")
        values = stack.transpose(2, 1, 0).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    chosen = choose_images(path, PLAN)
    assert chosen.folder == tmp_path
    assert {i.file for i in (*chosen.images, *chosen.held_back)} == {path.name}
    assert len(list(read_images(chosen.folder, chosen.images))) == 6


def test_one_picture_is_too_few(tmp_path, stack):
    Image.fromarray(stack[0]).save(tmp_path / "one.png")
    with pytest.raises(InputError, match=r"one.png: 1 different images in 1 files"):
        choose_images(tmp_path / "one.png", PLAN)


def test_read_images_gives_the_pixels_that_were_hashed(folder, stack):
    chosen = choose_images(folder, PLAN)
    read = dict(read_images(folder, chosen.images))
    assert set(read) == set(chosen.images)
    for image, pixels in read.items():
        assert (pixels.dtype, pixels.shape) == (np.uint8, (256, 256, 3))
        if image.file == "a/stack.npz":
            np.testing.assert_array_equal(pixels[..., 0], stack[image.slice])


def test_a_file_that_changed_is_noticed(tmp_path, stack):
    np.savez(tmp_path / "a.npz", imgs=stack)
    chosen = choose_images(tmp_path, PLAN)
    np.savez(tmp_path / "a.npz", imgs=stack[::-1])
    with pytest.raises(InputError, match="changed while it was in use"):
        list(read_images(tmp_path, chosen.images))


def test_the_manifest_holds_names_slices_and_hashes_only(folder):
    chosen = choose_images(folder, PLAN)
    manifest = chosen.manifest()
    assert [len(manifest[name]) for name in ("images", "held_back")] == [6, 2]
    assert set(manifest["images"][0]) == {"file", "slice", "sha256"}
    assert str(folder) not in repr(manifest)


def test_missing_data_says_what_to_pass(tmp_path):
    with pytest.raises(InputError, match="no such folder or file"):
        choose_images(tmp_path / "none", PLAN)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="no images"):
        choose_images(Path(tmp_path), PLAN)
    with pytest.raises(InputError, match=r"notes.txt: unknown kind of file: pass --calibration"):
        choose_images(tmp_path / "notes.txt", PLAN)


def test_noise_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", imgs=noise)
    with pytest.raises(InputError, match=r"noise.npz\[\d\] is noise"):
        choose_images(tmp_path, PLAN)


def test_every_bundled_image_passes_as_real():
    chosen = choose_images(bundled_examples(), replace(PLAN, images=12, held_back=1))
    assert len({image.file for image in chosen.images}) >= 4
