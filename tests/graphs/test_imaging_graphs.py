"""Images resized and masks made by graphs are those that the host makes."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from dbsam_deploy.core import graph_imaging
from dbsam_deploy.core.contract import MAX_SIDE_IN_GRAPH, encoder_spec, mask_bits_spec
from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.core.graph_imaging import encoder_feed, make_masks
from dbsam_deploy.core.imaging import (
    MODES,
    UNIT_RANGE,
    Preprocessing,
    postprocess,
    preprocess,
    resize_image,
    upscale_logits,
)
from dbsam_deploy.graphs.imaging_graphs import mask_bits_text, pixels_text
from dbsam_deploy.sessions.session import check_feed

SIZES = [(1, 1), (1, 90), (70, 1), (61, 90), (64, 64), (128, 128), (300, 128), (500, 333)]
"""One pixel, one row or column, smaller and larger than the frame, its own size, halved; tall."""
LARGE = (MAX_SIDE_IN_GRAPH + 1, 40)
SIDE = 64


def how_of(mode: str, side: int = SIDE) -> Preprocessing:
    return Preprocessing(side, mode, pixels_in_graph=True)


@cache
def session_of(text: str):
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]>\n{text}')
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def image_of(image, how):
    feed = encoder_feed(image, how)
    check_feed(encoder_spec(how), feed)
    return session_of(pixels_text(how)).run(None, feed)[0]


def masks_of(logits, size, how, out=None):
    def run(feed):
        check_feed(mask_bits_spec(how), feed)
        return session_of(mask_bits_text(how)).run(None, feed)[0]

    return make_masks(logits, size, how, run, out)


def check_image(image, mode, side=SIDE):
    how = how_of(mode, side)
    found, wanted = image_of(image, how), preprocess(image, how.on_host)
    assert found.shape == wanted.shape
    if mode == "sam2":  # grey values that are not whole
        np.testing.assert_allclose(
            found, wanted, rtol=0, atol=5e-5 if max(image.shape) > MAX_SIDE_IN_GRAPH else 2e-6
        )
    elif mode == "lite_medsam":  # a mean that is a half but for rounding
        span = np.ptp(resize_image(image, how)) / 255
        off = np.abs(found - wanted) * 255
        assert (off > 1e-3).mean() < 1e-2
        assert (off * span).max() < 1.01
    else:
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [*SIZES, LARGE], ids=lambda s: f"{s[0]}x{s[1]}")
def test_an_image_is_the_hosts(rng, mode, size):
    if mode == "medsam":
        pytest.importorskip("skimage")
    check_image(rng.integers(0, 256, (*size, 3), np.uint8), mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", [256, 1024])
@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (1500, 2000), (2000, 900), LARGE])
def test_an_image_of_full_size_is_the_hosts(rng, mode, side, size):
    check_image(rng.integers(0, 256, (*size, 3), np.uint8), mode, side)


@pytest.mark.parametrize("mode", ["sam", "lite_medsam", "sam2"])
@pytest.mark.parametrize("value", [0, 17, 255])
def test_an_image_of_one_colour_is_the_hosts(mode, value):
    image = np.full((33, 90, 3), value, np.uint8)
    found = image_of(image, how_of(mode))
    np.testing.assert_allclose(found, preprocess(image, how_of(mode).on_host), rtol=0, atol=2e-6)
    assert not found[..., 24:, :].any() or mode == "sam2"
    assert mode not in UNIT_RANGE or not found.any()


def test_images_of_a_batch_are_scaled_each_by_its_own_values(rng):
    how = how_of("lite_medsam")
    images = [rng.integers(0, most, (40, 64, 3), np.uint8) for most in (50, 256)]
    feeds = [encoder_feed(image, how) for image in images]
    batch = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    both = session_of(pixels_text(how)).run(None, batch)[0]
    for found, image in zip(both, images, strict=True):
        np.testing.assert_array_equal(found, image_of(image, how)[0])


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_what_is_no_image_is_refused_before_the_graph(image):
    with pytest.raises(InputError, match="image"):
        encoder_feed(image, how_of("sam"))


def smooth_logits(rng, count, side):
    """(count, side, side) with large parts of one sign, and values of all sizes."""
    grid = np.linspace(-3, 3, side)
    waves = rng.uniform(-2, 2, (count, 4))
    found = [
        np.sin(a * grid)[:, None] * np.cos(b * grid) + c * np.sin(d * grid) for a, b, c, d in waves
    ]
    return (np.array(found) * rng.choice([1e-6, 1, 30], (count, 1, 1))).astype(np.float32)


@pytest.mark.parametrize("mode", ["sam", "medsam2", "sam_med2d"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_masks_are_the_hosts_but_where_a_logit_is_rounding(rng, mode, size):
    how = how_of(mode, 128)
    logits = smooth_logits(rng, 10, how.mask_side).reshape(5, 2, how.mask_side, how.mask_side)
    found, wanted = masks_of(logits, size, how), postprocess(logits, size, how)
    assert found.dtype == np.uint8
    for place in np.ndindex(5, 2):
        other = found[place] != wanted[place]
        near = np.abs(upscale_logits(logits[place], size, how))
        assert (near[other] <= 1e-6 * np.abs(logits[place]).max()).all()
    assert (found != wanted).mean() < 1e-4


@pytest.mark.parametrize(("value", "inside"), [(-3, 0), (0, 0), (1e-20, 1), (5, 1)])
def test_masks_that_are_empty_or_full(value, inside):
    how = how_of("sam")
    logits = np.full((1, 1, how.mask_side, how.mask_side), value, np.float32)
    found = masks_of(logits, (21, 13), how)
    assert found.shape == (1, 1, 21, 13)
    assert (found == inside).all()


def test_masks_are_written_where_they_are_wanted(rng):
    how = how_of("sam")
    logits = smooth_logits(rng, 3, how.mask_side)[:, None]
    out = np.full((2, 3, 1, 20, 30), 7, np.uint8)
    masks_of(logits, (20, 30), how, out[1])
    np.testing.assert_array_equal(out[1], postprocess(logits, (20, 30), how))
    assert (out[0] == 7).all()


def test_masks_of_larger_images_are_made_on_the_host(rng, monkeypatch):
    how = how_of("sam")
    logits = smooth_logits(rng, 1, how.mask_side)
    found = make_masks(logits, LARGE, how, lambda feed: pytest.fail("asked the graph"))
    np.testing.assert_array_equal(found, postprocess(logits, LARGE, how))
    monkeypatch.setattr(graph_imaging, "MAX_SIDE_IN_GRAPH", 10)
    make_masks(logits, (20, 30), how, lambda feed: pytest.fail("asked the graph"))


def test_logits_that_no_mask_is_made_of_are_refused():
    how = how_of("sam")
    logits = np.zeros((1, how.mask_side, how.mask_side), np.float32)
    with pytest.raises(InputError, match="low_res_masks"):
        masks_of(logits[:, 1:], (20, 30), how)
    logits[0, 0, 0] = np.nan
    with pytest.raises(EngineError, match="NaN"):
        masks_of(logits, (20, 30), how)


def test_sam_2_is_not_resized_in_a_graph_where_digits_would_not_fit():
    assert Preprocessing(1024, "sam2", pixels_in_graph=True).on_host == Preprocessing(1024, "sam2")
    with pytest.raises(InputError, match="at most 1024 are possible; take --imaging host"):
        Preprocessing(1040, "sam2", pixels_in_graph=True)
