"""The one intensity stage: what every value of every type becomes, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.images.intensity import PERCENTILES, to_uint8

HERE = Path("scan")


def test_negative_values_count_all_voxels_and_keep_zero() -> None:
    values = np.linspace(-1000, 1000, 2001, dtype=np.float32).reshape(1, 3, 667)
    pixels, text = to_uint8(values, None, HERE)
    assert pixels.ravel()[0] == 0
    assert pixels.ravel()[-1] == 255
    assert pixels.ravel()[1000] in (126, 127, 128)  # 0 HU is in the middle, not black
    assert "of all voxels" in str(text)
    assert "consider the window 40 400" in str(text)


def test_window_equals_the_formula(rng: np.random.Generator) -> None:
    hu = rng.integers(-1200, 1500, (3, 8, 9)).astype(np.float32)
    pixels, _ = to_uint8(hu, (40, 400), HERE)
    expected = ((np.clip(hu.astype(float), -160, 240) + 160) / 400 * 255).astype(np.uint8)
    np.testing.assert_array_equal(pixels, expected)


def test_a_window_applies_to_bytes_too() -> None:
    pixels, _ = to_uint8(np.array([[[0, 50, 100, 200]]], np.uint8), (75, 50), HERE)
    assert pixels.tolist() == [[[0, 0, 255, 255]]]


def test_bytes_are_taken_as_they_are(rng: np.random.Generator) -> None:
    values = rng.integers(0, 90, (2, 4, 5), dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(values, None, HERE)[0], values)


@pytest.mark.parametrize(
    ("values", "window", "message"),
    [
        (np.array([[[1, np.nan]]]), None, "^scan holds NaN or infinity: replace them"),
        (np.array([[[1, np.inf]]]), (1, 2), "NaN or infinity"),
        (np.zeros((1, 4, 4), np.float32), None, "all values are 0"),
        (np.full((1, 4, 4), 7, np.int16), None, "all values are 7"),
        (np.zeros((1, 4, 4), bool), None, "real numbers"),
        (np.zeros((1, 4, 4), np.complex64), None, "real numbers"),
        (np.arange(4).reshape(1, 2, 2), (40, 0), "width > 0"),
        (np.arange(4).reshape(1, 2, 2), (40, -5), "width > 0"),
        (np.arange(4).reshape(1, 2, 2), (np.nan, 5), "finite level"),
        (np.arange(4).reshape(1, 2, 2), (40,), r"^window \(40,\): expected two numbers, level and"),
        (np.arange(4).reshape(1, 2, 2), ("a", 5), r"^window \('a', 5\): expected two numbers"),
        (np.arange(4).reshape(1, 2, 2), 40, "^window 40: expected two numbers"),
    ],
)
def test_intensities_that_cannot_be_shown(
    values: np.ndarray, window: tuple[float, float] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        to_uint8(values, window, HERE)


EXTREMES = [
    np.array([-1.7e308, 0, 1.7e308]),
    np.array([-3.4e38, 0, 3.4e38], np.float32),
    np.array([-65504, 0, 65504], np.float16),
    np.array([-(2**63), 0, 2**63 - 1], np.int64),
    np.array([-32768, 0, 32767], np.int16),
    np.array([-128, 0, 127], np.int8),
    np.array([2**53 - 1, 2**53, 2**53 + 1], np.uint64),  # the last one is no float64
    np.array([2**60, 2**60 + 50, 2**60 + 100], np.uint64),
    np.array([-(2**60), -(2**60) + 50, -(2**60) + 100], np.int64),
    np.array([-5e-324, 0, 5e-324]),
]


@pytest.mark.parametrize("line", EXTREMES, ids=lambda line: f"{line.dtype}:{line[0]}")
def test_extremes_of_every_type_reach_black_grey_and_white(line: np.ndarray) -> None:
    pixels, how = to_uint8(np.repeat(line, 100).reshape(1, 20, 15), None, HERE)
    low, middle, high = pixels.ravel()[[0, 150, -1]].tolist()
    assert (low, high) == (0, 255)
    assert middle in (127, 128)
    assert (how.low, how.high) == (float(line[0]), float(line[-1]))


def test_percentiles_are_numpys(rng: np.random.Generator) -> None:
    values = rng.normal(100, 30, (3, 41, 17))
    values -= values.min() - 1
    _, how = to_uint8(values, None, HERE)
    assert (how.low, how.high) == pytest.approx(np.percentile(values, PERCENTILES), rel=1e-12)


def test_percentiles_between_the_ends_of_float64_do_not_overflow() -> None:
    """Their difference has no float64."""
    _, how = to_uint8(np.array([[[-1.7e308, 1.7e308]]]), None, HERE)
    assert (how.how, how.high) == ("percentiles", -how.low)
    assert how.high == pytest.approx(1.7e308 * 0.99, rel=1e-12)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("ground", [0, 100])
def test_two_values_become_black_and_white(dtype: type, ground: int) -> None:
    values = np.full((1, 100, 100), ground, dtype)
    values[0, 40:44, 40:45] = 700  # 0.2 % of the pixels: beyond the percentiles
    pixels, how = to_uint8(values, None, HERE)
    np.testing.assert_array_equal(pixels == 255, values == 700)
    assert (pixels[values == ground] == 0).all()
    assert (how.how, how.low, how.high) == ("range", ground, 700)
    # Without the zeros one value would be left, and no range.
    which = "all" if ground == 0 else "non-zero"
    assert f"lowest to highest of {which} voxels ({ground} to 700), as their" in str(how)
    assert "coincide" in str(how)


def test_a_small_object_on_flat_ground_within_black_has_its_contrast() -> None:
    values = np.full((1, 100, 100), 100, np.uint16)
    values[0, :20] = 0
    values[0, 40:44, 40:45] = 110
    pixels, how = to_uint8(values, None, HERE)
    assert (pixels[values == 110] == 255).all()
    assert (pixels[values <= 100] == 0).all()
    assert (how.low, how.high) == (100, 110)


CONSTANT = "scan: all values are 7; there is nothing to segment"


@pytest.mark.parametrize("window", [None, (40, 400), (1000, 10)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int64, np.float32, np.float64])
def test_a_constant_image_is_refused_in_the_same_words(dtype: type, window: tuple) -> None:
    for shape in ((1, 4, 5), (3, 4, 5), (1, 4, 5, 3)):
        with pytest.raises(InputError) as refused:
            to_uint8(np.full(shape, 7, dtype), window, HERE)
        assert str(refused.value) == CONSTANT


def test_a_huge_constant_is_refused_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Adding 1 to it changes nothing."""
    with pytest.raises(InputError, match=r"all values are -4e\+25; there is nothing"):
        to_uint8(np.full((1, 4, 5), -4e25), None, HERE)
    signalling = np.full((1, 4, 5), 0x7FA00000, np.uint32).view(np.float32)
    with pytest.raises(InputError, match="NaN"):
        to_uint8(signalling, None, HERE)
    assert not recwarn


def test_one_colour_everywhere_is_constant_too() -> None:
    values = np.tile(np.array([200, 100, 50], np.uint8), (1, 4, 5, 1))
    for given in (values, values.astype(np.uint16)):
        with pytest.raises(InputError, match="all values are 200 100 50; there is nothing"):
            to_uint8(given, None, HERE)
    values[0, 0, 0, 2] += 1
    assert to_uint8(values, None, HERE)[0][0, 0, 0, 2] == 51


@pytest.mark.parametrize(("window", "shade"), [((40, 400), 255), ((9000, 100), 0)])
def test_a_window_outside_the_values_says_so(window: tuple[float, float], shade: int) -> None:
    values = np.arange(1000, 3000, dtype=np.int16).reshape(1, 40, 50)
    with pytest.raises(InputError, match=f"every pixel is {shade}.* 1000 to 2999.*within them"):
        to_uint8(values, window, HERE)


@pytest.mark.parametrize("window", [(1e308, 1.7e308), (1e17, 1e-3)])
def test_a_window_whose_ends_are_no_numbers(window: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="two finite numbers"):
        to_uint8(np.arange(4).reshape(1, 2, 2), window, HERE)


@pytest.mark.parametrize("padding", [63536, 0, np.nan, -np.inf])
@pytest.mark.parametrize("is_inverted", [False, True])
def test_excluded_pixels_do_not_count_and_are_black(padding: float, is_inverted: bool) -> None:
    values = np.linspace(100, 200, 10000).reshape(1, 100, 100)
    excluded = np.zeros(values.shape, bool)
    excluded[0, 90:] = True
    values[excluded] = padding
    pixels, how = to_uint8(values, None, HERE, excluded=excluded, is_inverted=is_inverted)
    assert (pixels[excluded] == 0).all()
    shown = pixels[~excluded].astype(int)
    expected = (values[~excluded] - 100) / 90 * 255
    assert np.abs(shown - (255 - expected if is_inverted else expected)).max() <= 3
    assert how.excluded == 1000
    assert "1000 padding or fill values left out" in str(how)


def test_one_excluded_pixel_is_said_in_the_singular() -> None:
    values = np.arange(20, dtype=np.uint8).reshape(1, 4, 5)
    _, how = to_uint8(values, None, HERE, excluded=values == 19)
    assert str(how) == "0–255 as stored; 1 padding or fill value left out, shown as 0"


def test_all_excluded_is_nothing() -> None:
    values = np.arange(20.0).reshape(1, 4, 5)
    with pytest.raises(InputError, match="padding or a fill value; there is nothing to segment"):
        to_uint8(values, None, HERE, excluded=np.ones(values.shape, bool))
    most = values > 0
    most[0, 0, 1] = False  # two are left
    to_uint8(values, None, HERE, excluded=most)
    most[0, 0, 1] = True
    with pytest.raises(InputError, match="all values are 0"):
        to_uint8(values, None, HERE, excluded=most)


def test_inversion_comes_after_the_window() -> None:
    values = np.array([[[0, 100, 200, 300, 400]]], np.uint16)
    pixels, how = to_uint8(values, (200, 200), HERE, is_inverted=True)
    assert pixels.tolist() == [[[255, 255, 128, 0, 0]]]
    assert (how.low, how.high, how.is_inverted) == (100, 300, True)
    stored, _ = to_uint8(np.array([[[0, 5, 255]]], np.uint8), None, HERE, is_inverted=True)
    assert stored.tolist() == [[[255, 250, 0]]]


def test_neither_the_values_nor_the_padding_are_changed() -> None:
    for dtype in (np.uint8, np.float32):
        values = np.arange(12, dtype=dtype).reshape(1, 3, 4)
        excluded = values > 10
        before = values.copy()
        for is_inverted in (False, True):
            to_uint8(values, None, HERE, excluded=excluded, is_inverted=is_inverted)
        np.testing.assert_array_equal(values, before)


def test_with_negative_values_zeros_count_among_the_percentiles() -> None:
    values = np.repeat(np.array([-1000, 0, 1000], np.int16), [3, 990, 7]).reshape(1, 20, 50)
    pixels, how = to_uint8(values, None, Path("scan"))
    assert (how.low, how.high) == (0, 1000)
    assert "percentile of all voxels (0 to 1000)" in str(how)
    assert sorted(set(pixels.ravel().tolist())) == [0, 255]


def test_what_is_constant_beside_its_padding_is_refused() -> None:
    values = np.full((1, 8, 9), 700, np.int16)
    values[:, :3] = -2000
    with pytest.raises(InputError, match="scan: all values are 700; there is nothing to segment"):
        to_uint8(values, (700, 400), Path("scan"), excluded=values == -2000)
    stored = np.where(values == 700, 7, 0).astype(np.uint8)  # bytes keep their padding till here
    with pytest.raises(InputError, match="scan: all values are 7; there is nothing to segment"):
        to_uint8(stored, None, Path("scan"), excluded=stored == 0)
