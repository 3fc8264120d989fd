"""Pre- and post-processing against independent references written with torch and Pillow."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dbsam_deploy.core.contract import MAX_IMAGE_PIXELS, MAX_POINTS, MAX_PROMPTS
from dbsam_deploy.core.errors import EngineError, InputError, MissingError
from dbsam_deploy.core.imaging import (
    Preprocessing,
    check_boxes,
    check_contrast,
    check_image,
    check_points,
    postprocess,
    preprocess,
    to_model_frame,
    upscale_logits,
)
from dbsam_deploy.core.resizing import area_resize
from dbsam_deploy.core.scaling import PIXEL_MEAN, PIXEL_STD

# Square, both orientations, sides that do not divide, larger and smaller than the frame, one pixel.
SIZES = [(256, 256), (181, 258), (427, 640), (100, 37), (1, 300), (300, 1), (1, 1), (129, 128)]


def random_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def longest_side_size(height: int, width: int, side: int) -> tuple[int, int]:
    scale = side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def sam_pixels(image: np.ndarray, side: int) -> np.ndarray:
    """SAM's transform: resize the longest side, z-score, pad right and bottom with zeros.

    With Pillow as it was when SAM was published: 13 takes the rows of some tall images first.
    """
    height, width = longest_side_size(*image.shape[:2], side)
    wide = Image.fromarray(image, "RGB").resize((width, image.shape[0]), Image.BILINEAR)
    resized = np.array(wide.resize((width, height), Image.BILINEAR))
    x = torch.from_numpy(resized).permute(2, 0, 1).float()
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    return F.pad((x - mean) / std, (0, side - width, 0, side - height))[None].numpy()


def sam_logits(low: np.ndarray, size: tuple[int, int], side: int) -> np.ndarray:
    """SAM's `postprocess_masks` in double: up to the frame, crop the padding, to the image."""
    height, width = longest_side_size(*size, side)
    x = F.interpolate(
        torch.from_numpy(low).double()[None, None],
        (side, side),
        mode="bilinear",
        align_corners=False,
    )
    x = x[..., :height, :width]
    return F.interpolate(x, size, mode="bilinear", align_corners=False)[0, 0].numpy()


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_sam_preprocess_equals_reference(rng: np.random.Generator, size: tuple[int, int]) -> None:
    image = random_image(rng, *size)
    for side in (64, 256):
        got = preprocess(image, Preprocessing(side))
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
        np.testing.assert_allclose(got, sam_pixels(image, side), rtol=0, atol=1e-6)


def test_sam_padding_is_zero_after_normalising(rng: np.random.Generator) -> None:
    got = preprocess(random_image(rng, 32, 64), Preprocessing(64))
    assert (got[0, :, 32:] == 0).all()
    assert (got[0, :, :32] != 0).any()


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_sam_upscaling_equals_two_stage_interpolation(
    rng: np.random.Generator, size: tuple[int, int]
) -> None:
    side = 256
    low = (rng.standard_normal((side // 4, side // 4)) * 8).astype(np.float32)
    expected = sam_logits(low, size, side)
    got = upscale_logits(low, size, Preprocessing(side))
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5)
    masks = postprocess(low[None, None], size, Preprocessing(side))
    clear = np.abs(expected) > 1e-3  # nearer to 0 the sign may differ by rounding
    assert masks.shape == (1, 1, *size)
    assert masks.dtype == np.uint8
    np.testing.assert_array_equal(masks[0, 0][clear], (expected > 0)[clear])


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_medsam_upscaling_is_one_interpolation(
    rng: np.random.Generator, size: tuple[int, int]
) -> None:
    low = rng.standard_normal((64, 64)).astype(np.float32)
    double = torch.from_numpy(low).double()[None, None]
    expected = F.interpolate(double, size, mode="bilinear", align_corners=False)[0, 0]
    got = upscale_logits(low, size, Preprocessing(256, "medsam"))
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("size", [(256, 256), (181, 258), (40, 17)])
def test_medsam_preprocess_equals_reference(
    rng: np.random.Generator, size: tuple[int, int]
) -> None:
    transform = pytest.importorskip("skimage.transform")
    # A range short of 0–255 shows that min and max are the image's own.
    image = rng.integers(20, 180, (*size, 3), dtype=np.uint8)
    resized = transform.resize(
        image, (128, 128), order=3, preserve_range=True, anti_aliasing=True
    ).astype(np.uint8)
    expected = (resized - resized.min()) / np.clip(resized.max() - resized.min(), 1e-8, None)
    got = preprocess(image, Preprocessing(128, "medsam"))
    np.testing.assert_allclose(got[0], expected.transpose(2, 0, 1), rtol=0, atol=1e-6)
    assert got.min() == 0
    assert got.max() == 1


def test_medsam_preprocess_of_a_constant_image_is_zero() -> None:
    pytest.importorskip("skimage")
    image = np.full((20, 30, 3), 77, np.uint8)
    assert (preprocess(image, Preprocessing(64, "medsam")) == 0).all()


def test_medsam_preprocess_names_the_package_that_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "skimage.transform", None)
    with pytest.raises(MissingError, match=r'scikit-image, which is not.*: pip install "scik'):
        preprocess(np.zeros((20, 30, 3), np.uint8), Preprocessing(64, "medsam"))


def area_mean(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Exact area resize: every pixel repeated, then means of equal groups, in one axis each."""
    x = image.astype(np.float64)
    for axis, count in ((0, height), (1, width)):
        x = np.moveaxis(x, axis, 0)
        x = np.repeat(x, count, 0).reshape(count, len(x), *x.shape[1:]).mean(1)
        x = np.moveaxis(x, 0, axis)
    return x


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_area_resize_is_the_mean_over_each_pixels_area(
    rng: np.random.Generator, size: tuple[int, int]
) -> None:
    image = random_image(rng, *size)
    target = longest_side_size(*size, 64)
    got = area_resize(image, target)
    assert got.dtype == np.uint8
    # Half a grey value from rounding.
    np.testing.assert_allclose(got, area_mean(image, *target), rtol=0, atol=0.5 + 1e-9)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_sam2_preprocess_is_torchs_antialiased_bilinear(
    rng: np.random.Generator, size: tuple[int, int]
) -> None:
    """torchvision's Resize of a float tensor calls just this."""
    image = random_image(rng, *size)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, (64, 64), mode="bilinear", antialias=True)[0]
    expected = (resized.permute(1, 2, 0).numpy() - PIXEL_MEAN) / PIXEL_STD
    got = preprocess(image, Preprocessing(64, "sam2"))[0].transpose(1, 2, 0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-6)


def test_medsam2_preprocess_is_pillows_own_resize(rng: np.random.Generator) -> None:
    image = random_image(rng, 45, 70)
    expected = np.asarray(Image.fromarray(image).resize((64, 64)), np.float32)
    got = preprocess(image, Preprocessing(64, "medsam2"))[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(got, (expected - PIXEL_MEAN) / PIXEL_STD)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_lite_medsam_preprocess_is_zero_to_one_and_padded(
    rng: np.random.Generator, size: tuple[int, int]
) -> None:
    image = rng.integers(20, 180, (*size, 3), dtype=np.uint8)
    how = Preprocessing(64, "lite_medsam", embedding_stride=4)
    height, width = longest_side_size(*size, 64)
    resized = area_resize(image, (height, width)).astype(np.float64)
    expected = (resized - resized.min()) / (resized.max() - resized.min())
    got = preprocess(image, how)
    assert got.shape == (1, 3, 64, 64)
    assert got.dtype == np.float32
    content = got[0, :, :height, :width].transpose(1, 2, 0)
    np.testing.assert_allclose(content, expected, rtol=0, atol=1e-6)
    assert (got[0, :, height:] == 0).all()
    assert (got[0, :, :, width:] == 0).all()


def test_lite_medsam_preprocess_of_a_constant_image_is_zero() -> None:
    how = Preprocessing(64, "lite_medsam", embedding_stride=4)
    assert (preprocess(np.full((20, 30, 3), 77, np.uint8), how) == 0).all()


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_lite_medsam_upscaling_crops_the_padding_and_interpolates_once(
    rng: np.random.Generator, size: tuple[int, int]
) -> None:
    """LiteMedSAM's `postprocess_masks`: its mask grid is as fine as the model frame."""
    low = (rng.standard_normal((64, 64)) * 8).astype(np.float32)
    how = Preprocessing(64, "lite_medsam", embedding_stride=4)
    height, width = longest_side_size(*size, 64)
    cropped = torch.from_numpy(low[:height, :width]).double()[None, None]
    expected = F.interpolate(cropped, size, mode="bilinear", align_corners=False)[0, 0].numpy()
    got = upscale_logits(low, size, how)
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5)
    masks = postprocess(low[None], size, how)
    clear = np.abs(expected) > 1e-3
    np.testing.assert_array_equal(masks[0][clear], (expected > 0)[clear])


def test_postprocess_keeps_every_leading_axis(rng: np.random.Generator) -> None:
    low = rng.standard_normal((2, 3, 16, 16)).astype(np.float32)
    masks = postprocess(low, (20, 31), Preprocessing(64))
    assert masks.shape == (2, 3, 20, 31)
    for i in range(2):
        for j in range(3):
            alone = postprocess(low[i, j], (20, 31), Preprocessing(64))
            np.testing.assert_array_equal(masks[i, j], alone)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_postprocess_refuses_logits_that_are_not_finite(
    rng: np.random.Generator, bad: float
) -> None:
    low = rng.standard_normal((2, 1, 16, 16)).astype(np.float32)
    low[1, 0, 3, 4] = bad
    with pytest.raises(EngineError, match="NaN or infinity"):
        postprocess(low, (20, 20), Preprocessing(64))


def test_postprocess_refuses_another_mask_grid() -> None:
    with pytest.raises(InputError, match=r"expected \(\.\.\., 16, 16\)"):
        postprocess(np.zeros((1, 1, 32, 32), np.float32), (20, 20), Preprocessing(64))


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_model_frame_of_the_image_corners(size: tuple[int, int]) -> None:
    height, width = size
    box = np.array([[0, 0, width, height]])  # integers must not be truncated
    side = 1024
    content = longest_side_size(height, width, side)
    got = to_model_frame(box, size, Preprocessing(side))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [[0, 0, content[1], content[0]]], rtol=1e-6)
    squeezed = to_model_frame(box, size, Preprocessing(side, "medsam"))
    np.testing.assert_allclose(squeezed, [[0, 0, side, side]], rtol=1e-6)


def test_model_frame_keeps_fractions_of_integer_points() -> None:
    got = to_model_frame(np.array([[[1, 2]]]), (300, 300), Preprocessing(1024))
    np.testing.assert_allclose(got, [[[1024 / 300, 2048 / 300]]], rtol=1e-6)


def test_prompts_and_masks_are_in_a_frame_of_another_size_than_the_encoders_image() -> None:
    how, whole = Preprocessing(64, frame_size=128), Preprocessing(128)
    size = (45, 70)  # 41.1 of 64 rows, 82.3 of 128
    assert (how.pixel_size(size), how.content_size(size)) == ((41, 64), (82, 128))
    assert (how.grid, how.mask_side) == (whole.grid, whole.mask_side)
    image = random_image(np.random.default_rng(), *size)
    assert np.array_equal(preprocess(image, how), preprocess(image, Preprocessing(64)))
    box = np.array([[3, 4, 50, 41.5]])
    assert np.array_equal(to_model_frame(box, size, how), to_model_frame(box, size, whole))
    low = np.random.default_rng().normal(size=(32, 32)).astype(np.float32)
    assert np.array_equal(postprocess(low, size, how), postprocess(low, size, whole))


def test_preprocessing_refuses_unknown_modes_and_sizes() -> None:
    with pytest.raises(InputError, match="expected one of"):
        Preprocessing(256, "imagenet")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="multiple of 16"):
        Preprocessing(250)
    with pytest.raises(InputError, match="image size 100: expected a multiple of 16"):
        Preprocessing(64, frame_size=100)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "dtype float32"),
        (np.zeros((4, 4, 3), np.uint16), "dtype uint16"),
        (np.zeros((4, 4), np.uint8), "image shape"),
        (np.zeros((4, 4, 4), np.uint8), "image shape"),
        (np.zeros((1, 4, 4, 3), np.uint8), "image shape"),
        (np.zeros((0, 4, 3), np.uint8), "image shape"),
        (np.broadcast_to(np.uint8(0), (MAX_IMAGE_PIXELS + 1, 1, 3)), "at most"),
    ],
)
def test_check_image_refuses(image: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_image(image)


def test_check_image_accepts_the_largest() -> None:
    image = np.broadcast_to(np.uint8(0), (MAX_IMAGE_PIXELS, 1, 3))
    assert check_image(image) is image


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (np.zeros((0, 4)), "0 boxes"),
        (np.tile([0, 0, 1, 1], (MAX_PROMPTS + 1, 1)), f"{MAX_PROMPTS + 1} boxes"),
        (np.zeros(4), "shape"),
        (np.zeros((1, 5)), "shape"),
        (np.array([["0", "0", "1", "1"]]), "numbers"),
        (np.array([[0, 0, 1, 1]], bool), "numbers"),
        (np.array([[0, 0, 1, 1]], object), "numbers"),
        (np.array([[5, 0, 2, 3]]), "x0 < x1"),
        (np.array([[0, 3, 2, 3]]), "y0 < y1"),
        (np.array([[0, 0, np.nan, 3]]), "finite"),
        (np.array([[0, 0, np.inf, 3]]), "finite"),
        (np.array([[-1, 0, 2, 3]]), "outside the image"),
        (np.array([[0, -0.5, 2, 3]]), "outside the image"),
        (np.array([[0, 0, 20.5, 3]]), "outside the image"),
        (np.array([[0, 0, 2, 11]]), "outside the image"),
    ],
)
def test_check_boxes_refuses(boxes: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_boxes(boxes, (10, 20))


def test_check_boxes_names_the_box_at_fault() -> None:
    with pytest.raises(InputError, match=r"box 1 \(0, 0, 30, 5\)"):
        check_boxes(np.array([[0, 0, 20, 10], [0, 0, 30, 5]]), (10, 20))


def test_check_boxes_accepts_the_whole_image() -> None:
    got = check_boxes(np.array([[0, 0, 20, 10]]), (10, 20))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [[0, 0, 20, 10]])


@pytest.mark.parametrize(
    ("coords", "labels", "message"),
    [
        (np.zeros((1, 2)), np.zeros((1, 2)), "point_coords of shape"),
        (np.zeros((1, 2, 3)), np.zeros((1, 2)), "point_coords of shape"),
        (np.zeros((1, 1, 2), bool), np.zeros((1, 1)), "point_coords of shape"),
        (np.zeros((1, 2, 2)), np.zeros((1, 3)), "point_labels of shape"),
        (np.zeros((0, 2, 2)), np.zeros((0, 2)), "0 point prompts"),
        (np.zeros((1, 0, 2)), np.zeros((1, 0)), "0 points in a prompt"),
        (
            np.zeros((1, MAX_POINTS - 1, 2)),
            np.zeros((1, MAX_POINTS - 1)),
            f"{MAX_POINTS - 1} points in a prompt",
        ),
        (np.zeros((1, 1, 2)), np.full((1, 1), 2), r"point labels \[2\]: expected only -1, 0 and 1"),
        (np.zeros((1, 1, 2)), np.full((1, 1), 0.5), "point labels"),
        (np.array([[[21, 5]]]), np.ones((1, 1)), "outside the image"),
        (np.array([[[5, 10.5]]]), np.ones((1, 1)), "outside the image"),
        (np.array([[[-1, 5]]]), np.zeros((1, 1)), "outside the image"),
        (np.array([[[np.nan, 5]]]), np.ones((1, 1)), "outside the image"),
    ],
)
def test_check_points_refuses(coords: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_points(coords, labels, (10, 20))


def test_check_points_ignores_the_place_of_no_point() -> None:
    coords, labels = check_points(
        np.array([[[20, 10], [np.nan, 999]]]), np.array([[1, -1]]), (10, 20)
    )
    np.testing.assert_array_equal(coords, [[[20, 10], [0, 0]]])
    np.testing.assert_array_equal(labels, [[1, -1]])
    assert labels.dtype == np.int32


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 100, 50)])
def test_an_image_of_one_colour_is_refused(colour: tuple[int, int, int]) -> None:
    image = np.tile(np.array(colour, np.uint8), (40, 50, 1))
    words = " ".join(str(value) for value in dict.fromkeys(colour))
    with pytest.raises(InputError, match=f"all values are {words}; there is nothing to segment"):
        check_contrast(image)
    for row, column in ((0, 0), (17, 33), (39, 49)):
        other = image.copy()
        other[row, column, 1] ^= 1
        assert check_contrast(other) is other
