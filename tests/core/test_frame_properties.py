"""What holds between the image frame and the model frame for every size of image."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dbsam_deploy.core.imaging import (
    MODES,
    Preprocessing,
    check_boxes,
    postprocess,
    preprocess,
    to_model_frame,
)

SIDES = st.integers(1, 90)
PLACES = st.sampled_from([None, 64, 256])
FRAMES = st.builds(
    Preprocessing, st.sampled_from([64, 128]), mode=st.sampled_from(MODES), frame_size=PLACES
)
KEEPING_ASPECT = st.builds(
    Preprocessing,
    st.sampled_from([64, 128]),
    mode=st.sampled_from(["sam", "lite_medsam"]),
    frame_size=PLACES,
)


@st.composite
def boxes(draw: st.DrawFn, size: tuple[int, int]) -> np.ndarray:
    """A box inside an image of `size`."""
    height, width = size
    x0, y0 = draw(st.floats(0, width - 0.5)), draw(st.floats(0, height - 0.5))
    x1, y1 = draw(st.floats(x0 + 0.25, width)), draw(st.floats(y0 + 0.25, height))
    return np.array([[x0, y0, x1, y1]])


@given(size=st.tuples(SIDES, SIDES), how=FRAMES)
def test_the_image_fills_the_frame(size, how) -> None:
    height, width = how.content_size(size)
    assert max(height, width) == how.frame_side
    assert min(height, width) >= 1
    if how.mode in ("sam", "lite_medsam"):
        exact = min(size) * how.frame_side / max(size)
        assert abs(min(height, width) - max(exact, 1)) <= 0.5
    else:
        assert height == width


@given(size=st.tuples(SIDES, SIDES), how=FRAMES, data=st.data())
def test_a_box_stays_the_same_part_of_the_image(size, how, data) -> None:
    box = check_boxes(data.draw(boxes(size)), size)
    height, width = how.content_size(size)
    moved = to_model_frame(box, size, how)
    part = box / [size[1], size[0], size[1], size[0]]
    np.testing.assert_allclose(moved / [width, height, width, height], part, atol=1e-5)
    assert (moved >= 0).all()
    assert (moved <= how.frame_side).all()
    corners = to_model_frame(box.reshape(2, 2), size, how)
    np.testing.assert_array_equal(corners.reshape(1, 4), moved)


@given(size=st.tuples(SIDES, SIDES), how=KEEPING_ASPECT, seed=st.integers(0, 9))
def test_padding_is_zero_and_the_image_is_not_in_it(size, how, seed) -> None:
    image = np.random.default_rng(seed).integers(200, 256, (*size, 3), dtype=np.uint8)
    image[0, 0] = 0
    pixels = preprocess(image, how)
    height, width = how.pixel_size(size)
    assert pixels.shape == (1, 3, how.image_size, how.image_size)
    assert (pixels[..., height:, :] == 0).all()
    assert (pixels[..., width:] == 0).all()
    if how.mode == "sam" and min(size) > 1:
        assert np.abs(pixels[..., :height, :width]).mean() > 0.5


@given(size=st.tuples(SIDES, SIDES), how=FRAMES, data=st.data())
def test_the_mask_lies_where_its_logits_do(size, how, data) -> None:
    """Logits that are positive left of a column, or above a row, of the image in the grid."""
    side = how.mask_side
    height, width = (part * side / how.frame_side for part in how.content_size(size))
    share = data.draw(st.floats(0.1, 0.9))
    across = data.draw(st.booleans())
    rows, columns = np.indices((side, side)) + 0.5
    edge = share * (width if across else height)
    logits = (edge - (columns if across else rows)).astype(np.float32)
    mask = postprocess(logits, size, how)
    assert mask.shape == size
    places = np.arange(size[1] if across else size[0]) + 0.5
    # In a pixel whose middle is on the edge, rounding decides.
    sure = np.abs(places - share * len(places)) > 1e-4 * len(places)
    lines = mask[:, sure] if across else mask[sure].T
    assert (lines == lines[:1]).all()  # a straight edge
    expected = places < share * len(places)
    found = mask[0] if across else mask[:, 0]
    near = np.abs(places - share * len(places)) <= 0.5 + len(places) / (width if across else height)
    assert (found[~near] == expected[~near]).all()
