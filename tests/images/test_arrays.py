"""Every form in which a program may hold an image gives the pixels that its file would give."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbsam_deploy.core.contract import MAX_IMAGE_PIXELS
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.arrays import as_volume
from dbsam_deploy.images.volumes import read_image


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng().integers(0, 256, (21, 34, 3), dtype=np.uint8)


def test_uint8_colours_are_taken_as_they_are(rgb):
    volume = as_volume(rgb)
    np.testing.assert_array_equal(volume.pixels, rgb[None])
    assert str(volume.intensity) == "0–255 as stored"
    assert volume.files == ()


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.tolist(),
        lambda x: x.astype(np.int64),
        lambda x: x.astype(np.uint16),
        lambda x: x.astype(np.float32),
        lambda x: x.astype(np.float64) / 255,
        lambda x: (x / 255).astype(np.float32),
        Image.fromarray,
    ],
    ids=["list", "int64", "uint16", "float 0-255", "float 0-1", "float32 0-1", "PIL"],
)
def test_the_same_colours_in_another_form(rgb, convert):
    np.testing.assert_array_equal(as_volume(convert(rgb)).pixels, rgb[None])


@pytest.mark.parametrize("suffix", [".png", ".npz"])
def test_a_path_is_read_as_its_file(rgb, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".png":
        Image.fromarray(rgb).save(path)
    else:
        np.savez(path, imgs=rgb)
    for image in (path, str(path), read_image(path)):
        volume = as_volume(image)
        np.testing.assert_array_equal(volume.pixels, rgb[None])
        assert volume.path == path


def test_grey_of_every_usual_shape(rgb):
    grey = rgb[..., 0]
    for image in (grey, grey[..., None], grey.tolist(), Image.fromarray(grey)):
        volume = as_volume(image)
        assert volume.pixels.shape == (1, 21, 34)
        np.testing.assert_array_equal(volume.slice_rgb(0), np.repeat(grey[..., None], 3, 2))


def test_bool_and_unit_floats_reach_both_ends():
    spots = np.zeros((9, 8), bool)
    spots[2:4, 3:5] = True
    for image in (spots, spots.astype(np.float32)):
        np.testing.assert_array_equal(as_volume(image).pixels[0], spots * np.uint8(255))


def test_grey_16_bits_go_the_way_of_a_file(tmp_path):
    values = np.random.default_rng().integers(0, 4096, (21, 34), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    from_file = read_image(tmp_path / "a.png")
    for image in (values, Image.open(tmp_path / "a.png")):
        volume = as_volume(image)
        np.testing.assert_array_equal(volume.pixels, from_file.pixels)
        assert volume.intensity == from_file.intensity
    window = as_volume(values, window=(1000, 500))
    np.testing.assert_array_equal(
        window.pixels, read_image(tmp_path / "a.png", window=(1000, 500)).pixels
    )
    assert "window level 1000" in str(window.intensity)


def test_rgba_is_laid_over_black_as_in_a_file(tmp_path):
    rgba = np.random.default_rng().integers(0, 256, (21, 34, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    expected = read_image(tmp_path / "a.png").pixels
    for image in (rgba, rgba.tolist(), rgba / 255, Image.fromarray(rgba)):
        volume = as_volume(image)
        np.testing.assert_array_equal(volume.pixels, expected)
        assert str(volume.intensity).endswith("transparency over black")


def test_torch_tensors_may_have_their_channels_first(rgb):
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(rgb.copy())
    first = tensor.permute(2, 0, 1)
    grad = (first.float() / 255).requires_grad_()
    for image in (tensor, first, first[None], first.float() / 255, grad):
        np.testing.assert_array_equal(as_volume(image).pixels, rgb[None])
    np.testing.assert_array_equal(as_volume(first[:1]).pixels, rgb[None, ..., 0])
    coarse = as_volume((first.float() / 255).bfloat16()).pixels.astype(int)
    assert np.abs(coarse - rgb).max() <= 1  # 8 bits of mantissa


def test_slices_of_an_array():
    stack = np.random.default_rng().integers(0, 256, (5, 21, 34), dtype=np.uint8)
    volume = as_volume(stack)
    assert volume.shape == (5, 21, 34)
    assert volume.is_volume


def test_slices_with_a_fourth_axis():
    stack = np.random.default_rng().integers(0, 256, (3, 21, 34, 3), dtype=np.uint8)
    np.testing.assert_array_equal(as_volume(stack).pixels, stack)
    np.testing.assert_array_equal(as_volume(stack[..., :1]).pixels, stack[..., 0])


@pytest.mark.parametrize("convert", [np.asarray, np.ndarray.tolist, lambda x: x / 255])
def test_channels_first_are_not_three_slices(rgb, convert):
    with pytest.raises(InputError, match=r"\(3, 21, 34\) may be one image with its channels first"):
        as_volume(convert(rgb.transpose(2, 0, 1)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.png", "no such file"),
        (np.zeros(5), "expected .H, W."),
        (np.zeros((2, 3, 4, 5, 6)), "expected .H, W."),
        (np.zeros((0, 5), np.uint8), "none of them 0"),
        (np.array(["a"]), "real numbers"),
        (np.array([[1j]]), "real numbers"),
        ([[1, 2], [3]], "no array"),
        (object(), "real numbers"),
        (None, "real numbers"),
        (np.array([[1.0, np.nan]]), "NaN or infinity"),
        (np.full((4, 4, 4), 3000, np.uint16), "RGBA"),
        (np.full((8, 8), 700, np.uint16), "nothing to segment"),
        (np.broadcast_to(np.uint8(0), (9000, 9000)), f"at most {MAX_IMAGE_PIXELS}"),
    ],
)
def test_what_is_no_image(image, message):
    with pytest.raises(InputError, match=message):
        as_volume(image)


def test_a_window_comes_before_reading_not_after(tmp_path, rgb):
    np.savez(tmp_path / "a.npz", imgs=rgb)
    with pytest.raises(InputError, match="read_image"):
        as_volume(read_image(Path(tmp_path / "a.npz")), window=(40, 400))


@pytest.mark.parametrize("broken", ["truncated", "closed", "empty"])
def test_a_pil_image_that_cannot_be_read_is_one_error(rgb, broken):
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "PNG")
    content = stream.getvalue()
    image = Image.open(io.BytesIO(content[:-40] if broken == "truncated" else content))
    if broken == "closed":
        image.close()
    with pytest.raises(InputError, match="PIL image"):
        as_volume(Image.new("F", (0, 5)) if broken == "empty" else image)


def test_an_open_file_is_no_image_and_stays_open(tmp_path):
    with (tmp_path / "a.png").open("wb") as stream:
        with pytest.raises(InputError, match="expected a path"):
            as_volume(stream)
        stream.write(b"still open")


def test_masked_values_are_refused(rgb):
    with pytest.raises(InputError, match="filled"):
        as_volume(np.ma.masked_greater(rgb, 100))
    np.testing.assert_array_equal(as_volume(np.ma.masked_greater(rgb, 255)).pixels[0], rgb)


def test_the_pixels_are_no_view_of_the_caller_s_array(rgb):
    volume, given = as_volume(rgb), rgb.copy()
    rgb[:] = 0
    np.testing.assert_array_equal(volume.pixels[0], given)
