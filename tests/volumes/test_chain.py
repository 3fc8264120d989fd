"""Objects carried through drawn volumes by models whose masks are known in advance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.masks import Prediction
from dbsam_deploy.volumes import chain as chain_module
from dbsam_deploy.volumes.chain import Anchor, ChainEnd, SliceMask, propagate
from dbsam_deploy.volumes.stop_rules import ChainRule

SIDE = 64
Answerer = Callable[[int, np.ndarray], np.ndarray]


class Scripted:
    """A decoder whose answer to a box on a slice is a function; it notes what it was asked."""

    def __init__(self, answer: Answerer, ious: Callable[[int], float] = lambda z: 0.9) -> None:
        self.answer, self.ious = answer, ious
        self.asked: list[tuple[int, np.ndarray]] = []

    def decode(self, index: int, boxes: np.ndarray) -> Prediction:
        self.asked.append((index, boxes))
        masks = np.stack([self.answer(index, box) for box in boxes])
        ious = np.full((len(boxes), 1), self.ious(index), np.float32)
        return Prediction(masks[:, None].astype(np.uint8), ious)

    @property
    def opened(self) -> list[int]:
        return [index for index, _ in self.asked]


def within(truth: np.ndarray) -> Answerer:
    """The truth's pixels inside the box."""

    def answer(index: int, box: np.ndarray) -> np.ndarray:
        x0, y0, x1, y1 = box.round().astype(int)
        inside = np.zeros(truth.shape[1:], bool)
        inside[y0:y1, x0:x1] = True
        return truth[index] & inside

    return answer


def square(row: int, column: int, length: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[row : row + length, column : column + length] = True
    return mask


def tube(depth: int, first: int, end: int, *, slide: int = 0) -> np.ndarray:
    """(depth, SIDE, SIDE): a square of 16 on slices first … end - 1 that slides along x."""
    truth = np.zeros((depth, SIDE, SIDE), bool)
    for z in range(first, end):
        truth[z] = square(20, 10 + slide * (z - first), 16)
    return truth


def anchor(truth: np.ndarray, index: int, label: int = 1, iou: float = 0.9) -> Anchor:
    return Anchor(label, index, truth[index], iou)


def run(
    decoder: Scripted,
    anchors: list[Anchor],
    depth: int,
    rule: ChainRule | None = None,
    **more: object,
) -> tuple[dict[tuple[int, int], SliceMask], dict[tuple[int, bool], ChainEnd]]:
    """Masks by label and slice, and ends by label and whether upwards."""
    ends: list[ChainEnd] = []
    found = list(propagate(decoder, anchors, depth, rule or ChainRule(), ended=ends.append, **more))  # type: ignore[arg-type]
    keys = [(item.label, item.index) for item in found]
    assert len(keys) == len(set(keys))
    up = [number % 2 == 0 for number in range(len(ends))]
    return dict(zip(keys, found, strict=True)), {
        (end.label, way): end for end, way in zip(ends, up, strict=True)
    }


def test_a_sliding_object_is_followed_to_both_of_its_ends() -> None:
    truth = tube(20, 4, 15, slide=2)
    decoder = Scripted(within(truth))
    found, ends = run(decoder, [anchor(truth, 9)], 20, ChainRule(margin_px=16))
    assert sorted(z for _, z in found) == [4, 5, 6, 7, 8, 10, 11, 12, 13, 14]
    for (_, z), item in found.items():
        np.testing.assert_array_equal(item.mask, truth[z])
    assert (ends[1, True].last, ends[1, False].last) == (14, 4)
    assert ends[1, True].reason == "slice 15: the mask is empty"
    assert decoder.opened == [10, 11, 12, 13, 14, 15, 8, 7, 6, 5, 4, 3]


def test_the_next_box_is_wider_by_the_margin_and_stays_on_the_slice() -> None:
    truth = np.stack([square(0, 40, 24)] * 2)
    for rule, expected in (
        (ChainRule(margin_px=8), [38, 0, 64, 26]),  # 8 px at 256 are 2 at 64
        (ChainRule(margin_mm=3), [39, 0, 64, 30]),  # 1 column of 3 mm, 6 rows of 0.5 mm
    ):
        decoder = Scripted(within(truth))
        run(decoder, [anchor(truth, 0)], 2, rule, spacing_mm=(5.0, 0.5, 3.0))
        assert decoder.asked[0][1].tolist() == [expected]
        assert decoder.asked[0][1].dtype == np.float32


def test_a_leak_ends_the_chain_and_its_mask_is_not_taken() -> None:
    truth = tube(8, 0, 8)

    def leaking(index: int, box: np.ndarray) -> np.ndarray:
        return square(5, 5, 50) if index >= 5 else truth[index]

    found, ends = run(Scripted(leaking), [anchor(truth, 2)], 8)
    assert max(z for _, z in found) == 4
    assert ends[1, True].last == 4
    assert "IoU with the mask before it 0.10, under 0.15" in ends[1, True].reason
    found, _ = run(Scripted(leaking), [anchor(truth, 2)], 8, ChainRule(min_overlap=0.05))
    assert (1, 5) in found


def test_an_unsure_model_ends_the_chain_by_the_anchors_own_estimate() -> None:
    truth = tube(8, 0, 8)
    for iou, last in ((0.9, 4), (0.5, 7)):
        decoder = Scripted(lambda z, box: truth[z], ious=lambda z: 0.9 if z < 5 else 0.4)
        _, ends = run(decoder, [anchor(truth, 2, iou=iou)], 8)
        assert ends[1, True].last == last


def test_another_brightness_ends_the_chain_where_pixels_are_given() -> None:
    truth = tube(8, 0, 8)
    rng = np.random.default_rng(0)
    pixels = rng.normal(100, 10, truth.shape).clip(0, 255).astype(np.uint8)
    pixels[6:] += 40

    def ends(**more: object) -> int:
        return run(Scripted(lambda z, box: truth[z]), [anchor(truth, 2)], 8, **more)[1][
            1, True
        ].last

    assert ends(intensities=lambda z: pixels[z]) == 5
    assert ends(intensities=lambda z: np.repeat(pixels[z][..., None], 3, 2)) == 5
    assert (
        ends(
            intensities=lambda z: pixels[z], rule=ChainRule(min_brightness_match=0.05, min_joint=0)
        )
        == 7
    )
    assert ends() == 7


def test_a_mask_that_is_weak_in_two_ways_ends_the_chain() -> None:
    truth = tube(8, 0, 8)
    rng = np.random.default_rng(0)
    pixels = rng.normal(100, 10, truth.shape).clip(0, 255).astype(np.uint8)
    pixels[6:] += 15  # alike by 0.79

    def last(iou: float, **rule: float) -> int:
        decoder = Scripted(lambda z, box: truth[z], ious=lambda z: 0.9 if z < 6 else iou)
        more = {"rule": ChainRule(**rule), "intensities": lambda z: pixels[z]}  # type: ignore[arg-type]
        return run(decoder, [anchor(truth, 2)], 8, **more)[1][1, True].last  # type: ignore[arg-type]

    assert last(0.9) == 7
    assert last(0.73) == 5
    assert last(0.73, min_joint=0) == 7


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
    more = {"intensities": lambda z: pixels[z], "spacing_mm": (1.0, 1.0, 1.0)}
    found, _ = run(decoder, [start], 4, ChainRule(min_iou_ratio=0, margin_px=0), **more)  # type: ignore[arg-type]
    index, asked = decoder.asked[0]
    assert index == 1
    assert asked.tolist() == [[9, 19, 27, 37], [9.5, 19.5, 26.5, 36.5]]
    whole = np.count_nonzero(found[1, 3].mask) > 0.9 * 16 * 16
    assert whole == followed
    assert not any(z == 1 for _, z in found)  # the anchor's own mask stays


def test_in_known_bounds_nothing_else_ends_a_chain() -> None:
    truth = tube(12, 0, 12)
    truth[6] = False  # a slice without an answer
    decoder = Scripted(within(truth), ious=lambda z: 0.1)
    found, ends = run(decoder, [anchor(truth, 4)], 12, bounds={1: (2, 9)})
    assert sorted(z for _, z in found) == [2, 3, 5, 7, 8]
    assert ends[1, True].reason == ends[1, False].reason == "the object's known end"
    np.testing.assert_array_equal(decoder.asked[1][1], decoder.asked[2][1])  # 6 changed nothing


def test_a_reach_and_a_direction_bound_the_work() -> None:
    truth = tube(30, 0, 30)
    decoder = Scripted(within(truth))
    _, ends = run(decoder, [anchor(truth, 10)], 30, ChainRule(reach=3))
    assert decoder.opened == [11, 12, 13, 9, 8, 7]
    assert ends[1, True].reason == "a reach of 3 slices"
    decoder = Scripted(within(truth))
    list(propagate(decoder, [anchor(truth, 10)], 30, ChainRule(reach=2), steps=(-1,)))
    assert decoder.opened == [9, 8]


def test_many_objects_share_each_slice_and_each_call() -> None:
    truths = [tube(20, first, end) for first, end in ((0, 20), (3, 12), (8, 18))]
    for number, truth in enumerate(truths):
        truths[number] = np.roll(truth, 20 * (number - 1), axis=1)  # rows 0, 20 and 40
    together = np.any(truths, axis=0)
    anchors = [anchor(truths[0], 10, 1), anchor(truths[1], 5, 2), anchor(truths[2], 12, 3)]
    decoder = Scripted(within(together))
    told: list[tuple[int, int]] = []
    found, _ = run(decoder, anchors, 20, progress=lambda done, total: told.append((done, total)))
    up, down = decoder.opened[:14], decoder.opened[14:]
    assert up == list(range(6, 20))  # each slice once a direction
    assert down == list(range(11, -1, -1))
    assert {z: len(boxes) for z, boxes in decoder.asked[:14]}[11] == 2
    for (label, z), item in found.items():
        np.testing.assert_array_equal(item.mask, truths[label - 1][z])
    assert len(found) == 19 + 8 + 9
    assert told[-1] == (26, 26)
    assert [done for done, _ in told] == list(range(27))


def test_a_crowd_is_decoded_in_as_many_calls_as_memory_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    truth = tube(3, 0, 3)
    anchors = [anchor(truth, 1, label) for label in range(1, 6)]
    monkeypatch.setattr(chain_module, "prompts_at_once", lambda size: 2)
    decoder = Scripted(within(truth))
    found, _ = run(decoder, anchors, 3)
    assert len(found) == 10
    assert [len(boxes) for _, boxes in decoder.asked] == [2, 2, 1] * 2


def test_two_anchors_meet_where_their_chains_agree_best() -> None:
    truth = tube(13, 0, 13)

    def drifting(index: int, box: np.ndarray) -> np.ndarray:
        return square(20, int(box[0]) + 3, 16)  # whatever is there: 2 px further each slice

    rule = ChainRule(margin_px=4)  # 1 px at 64
    found, ends = run(Scripted(drifting), [anchor(truth, 2), anchor(truth, 10)], 13, rule)
    columns = {z: int(np.flatnonzero(item.mask.any(0))[0]) for (_, z), item in found.items()}
    # both chains start at column 10 and are 2 px further with each slice; they agree on slice 6
    assert [columns[z] for z in range(3, 10)] == [12, 14, 16, 18, 16, 14, 12]
    assert [columns[z] for z in (0, 1, 11, 12)] == [14, 12, 12, 14]
    assert ends


def test_a_slice_that_only_one_of_two_chains_reaches_is_that_ones() -> None:
    truth = tube(12, 0, 12)
    truth[6] = False
    decoder = Scripted(within(truth))
    found, _ = run(decoder, [anchor(truth, 2), anchor(truth, 10)], 12)
    assert sorted(z for _, z in found) == [0, 1, 3, 4, 5, 7, 8, 9, 11]


def test_no_chain_runs_over_a_known_slice() -> None:
    truth = tube(12, 0, 12)
    decoder = Scripted(within(truth))
    known = [anchor(truth, 3), anchor(truth, 7), anchor(truth, 5)]
    found, _ = run(decoder, known, 12)
    assert sorted(z for _, z in found) == [0, 1, 2, 4, 6, 8, 9, 10, 11]
    assert not {3, 5, 7} & set(decoder.opened)


def test_what_cannot_be_carried_is_refused_before_the_model_is_asked() -> None:
    truth = tube(8, 0, 8)
    decoder = Scripted(within(truth))
    for anchors, bounds, words in (
        ([Anchor(1, 9, truth[0])], {}, "slice 9 for object 1: expected one of 0 to 7"),
        ([anchor(truth, 5)], {1: (0, 5)}, "slice 5 for object 1: expected one of 0 to 4"),
        ([anchor(truth, 5)] * 2, {}, "object 1 has two masks on slice 5"),
        ([Anchor(1, 5, truth[0] & False)], {}, "object 1 has an empty mask on slice 5"),
    ):
        with pytest.raises(InputError, match=words):
            list(propagate(decoder, anchors, 8, ChainRule(), bounds=bounds))
    assert decoder.asked == []
    for wrong in (
        {"min_overlap": 1.5},
        {"margin_mm": -1.0},
        {"reach": 0},
        {"min_brightness_match": 2.0},
    ):
        with pytest.raises(InputError, match="expected"):
            ChainRule(**wrong)  # type: ignore[arg-type]


def pictured(truth: np.ndarray, seed: int = 0) -> np.ndarray:
    """Pixels of a bright object on a darker ground, with noise."""
    noise = np.random.default_rng(seed).normal(0, 5, truth.shape)
    return (np.where(truth, 150, 80) + noise).clip(0, 255).astype(np.uint8)


def fills_its_box(index: int, box: np.ndarray) -> np.ndarray:
    x0, y0, x1, y1 = box.round().astype(int)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y0:y1, x0:x1] = True
    return mask


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
