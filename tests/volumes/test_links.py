"""What one link of a chain follows: the image, the prompt's own box, a surer mask."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.scripted_decoder import (
    SIDE,
    Scripted,
    anchor,
    fills_its_box,
    pictured,
    run,
    square,
    tube,
    within,
)

from dbsam_deploy.volumes.links import Anchor
from dbsam_deploy.volumes.stop_rules import ChainRule


def test_beside_the_anchor_the_prompts_own_box_is_asked_for_too() -> None:
    """Of a mask that is half of its object, the other half is found on the next slice."""
    truth = tube(5, 0, 5)
    half = Anchor(1, 2, square(20, 10, 8), 0.9, prompt=np.array([10, 20, 26, 36], np.float32))
    decoder = Scripted(within(truth))
    found, _ = run(decoder, [half], 5, ChainRule(margin_px=8))  # 2 px at 64
    for z in (1, 3):
        np.testing.assert_array_equal(found[1, z].mask, truth[z])
    asked = {z: boxes[0].tolist() for z, boxes in decoder.asked[1:]}
    assert asked[3] == asked[1] == [8, 18, 26, 36]
    assert asked[4] == [8, 18, 28, 38]  # two pixels around the last mask


@pytest.mark.parametrize(("iou", "followed"), [(0.6, True), (0.75, False)])
def test_a_much_surer_mask_of_a_wider_box_is_followed(iou: float, followed: bool) -> None:
    truth, pixels = tube(4, 0, 4), pictured(tube(4, 0, 4))
    half, box = truth[1] & square(0, 0, 28), np.array([10, 20, 26, 36], np.float32)
    decoder = Scripted(within(truth), ious=lambda z: 0.8)
    start = Anchor(1, 1, half, iou, prompt=box)
    rule, spacing_mm = ChainRule(min_iou_ratio=0, margin_px=0), (1.0, 1.0, 1.0)
    found, _ = run(
        decoder, [start], 4, rule, intensities=lambda z: pixels[z], spacing_mm=spacing_mm
    )
    index, asked = decoder.asked[0]
    assert index == 1
    assert asked.tolist() == [[9, 19, 27, 37], [9.5, 19.5, 26.5, 36.5]]
    whole = np.count_nonzero(found[1, 3].mask) > 0.9 * 16 * 16
    assert whole == followed
    assert not any(z == 1 for _, z in found)  # the anchor's own mask stays


def test_the_image_holds_a_model_that_creeps_outwards() -> None:
    """One that fills its box adds the margin on each slice, unless the image says otherwise."""
    truth = tube(12, 0, 12)
    rule = ChainRule(margin_px=8, min_brightness_match=0, min_joint=0)  # 2 px at 64
    pixels = pictured(truth)
    rows = {}
    for follow in (True, False):
        found, _ = run(
            Scripted(fills_its_box),
            [anchor(truth, 1)],
            12,
            replace(rule, follow_image=follow),
            intensities=lambda z: pixels[z],
            spacing_mm=(1.0, 1.0, 1.0),
        )
        rows[follow] = int(found[1, 8].mask.any(1).sum())
    assert rows[False] == 16 + 7 * 4
    assert 16 <= rows[True] <= 20  # the margin of one slice, not of seven


def ellipsoid(seed: int, depth: int = 20) -> np.ndarray:
    """(depth, SIDE, SIDE): one that leans and whose largest slice is the 11th."""
    rng = np.random.default_rng(seed)
    half, centre, lean = rng.uniform(14, 18, 2), rng.uniform(26, 38, 2), rng.uniform(-1, 1, 2)
    y, x = np.mgrid[:SIDE, :SIDE]
    along = (np.arange(depth) - 10)[:, None, None]
    rows = (y - centre[0] - lean[0] * along) / half[0]
    columns = (x - centre[1] - lean[1] * along) / half[1]
    return np.asarray(rows**2 + columns**2 + (along / rng.uniform(5, 7)) ** 2 < 1)


@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_fills_its_box_still_finds_an_object_in_noise(seed: int) -> None:
    truth = ellipsoid(seed)
    pixels = np.where(truth, 110, 80) + np.random.default_rng(seed).normal(0, 12, truth.shape)
    pixels = pixels.clip(0, 255).astype(np.uint8)
    found, _ = run(
        Scripted(fills_its_box),
        [anchor(truth, 10)],
        len(truth),
        intensities=lambda z: pixels[z],
        spacing_mm=(3.0, 1.0, 1.0),
    )
    masks = np.zeros_like(truth)
    masks[10] = truth[10]
    for (_, z), item in found.items():
        masks[z] = item.mask
    assert 2 * np.count_nonzero(masks & truth) / (masks.sum() + truth.sum()) > 0.9


def test_an_object_that_shrinks_by_much_is_followed() -> None:
    truth = np.stack([square(20, 20, 24), square(24, 24, 10), square(24, 24, 9)])
    found, _ = run(Scripted(within(truth)), [anchor(truth, 0)], 3)  # IoU 0.17
    assert sorted(z for _, z in found) == [1, 2]


def test_the_image_follows_an_object_that_leaves_the_last_masks_box() -> None:
    truth = tube(8, 0, 8, slide=4)
    pixels = pictured(truth)
    exact = {"rule": ChainRule(margin_px=0), "spacing_mm": (4.0, 1.0, 1.0)}
    found, _ = run(
        Scripted(within(truth)), [anchor(truth, 0)], 8, intensities=lambda z: pixels[z], **exact
    )
    assert np.count_nonzero(found[1, 7].mask) > 0.9 * 16 * 16
    found, _ = run(Scripted(within(truth)), [anchor(truth, 0)], 8, **exact)
    assert (1, 7) not in found or np.count_nonzero(found[1, 7].mask) < 0.3 * 16 * 16


def test_what_does_not_look_like_the_object_is_cut_off_the_mask() -> None:
    truth = tube(3, 0, 3)
    far = square(45, 45, 10)
    pixels = pictured(truth)

    def with_a_stray_piece(index: int, box: np.ndarray) -> np.ndarray:
        return truth[index] | far

    def mask(rule: ChainRule) -> np.ndarray:
        decoder = Scripted(with_a_stray_piece)
        return run(decoder, [anchor(truth, 0)], 3, rule, intensities=lambda z: pixels[z])[0][
            1, 1
        ].mask

    assert not mask(ChainRule())[far].any()
    assert mask(ChainRule(min_likeness=0, min_brightness_match=0))[far].all()
    np.testing.assert_array_equal(mask(ChainRule())[truth[1]], True)


def test_a_chain_ends_where_nothing_looks_like_the_object_and_the_model_is_not_asked() -> None:
    truth = np.zeros((6, SIDE, SIDE), bool)
    truth[:4] = square(30, 30, 5)
    pixels = pictured(truth)
    decoder = Scripted(lambda z, box: truth[0])
    given = {"intensities": lambda z: pixels[z], "spacing_mm": (5.0, 1.0, 1.0)}
    _, ends = run(decoder, [anchor(truth, 1)], 6, **given)
    assert ends[1, True].reason == "slice 4: nothing there looks like the object"
    assert decoder.opened == [2, 3, 0]
    found, ends = run(decoder, [anchor(truth, 1)], 6, bounds={1: (0, 6)}, **given)
    assert (1, 5) in found  # a known extent is believed, whatever it looks like
