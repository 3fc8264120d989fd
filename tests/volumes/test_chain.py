"""Objects carried through drawn volumes: where chains go, meet and end."""

from __future__ import annotations

import numpy as np
import pytest
from support.scripted_decoder import Scripted, anchor, run, square, tube, within

from dbsam_deploy.core.errors import InputError
from dbsam_deploy.volumes import chain as chain_module
from dbsam_deploy.volumes.chain import propagate
from dbsam_deploy.volumes.links import Anchor
from dbsam_deploy.volumes.stop_rules import ChainRule


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

    def last(iou: float, of_anchor: float, rule: ChainRule) -> int:
        decoder = Scripted(lambda z, box: truth[z], ious=lambda z: 0.9 if z < 6 else iou)
        start = anchor(truth, 2, iou=of_anchor)
        _, ends = run(decoder, [start], 8, rule, intensities=lambda z: pixels[z])
        return ends[1, True].last

    assert last(0.8, 0.8, ChainRule()) == 7
    assert last(0.65, 0.8, ChainRule()) == 5
    assert last(0.65, 0.8, ChainRule(min_joint=0)) == 7
    assert last(0.6, 0.6, ChainRule()) == 5  # as likely as the anchor, but no more than 0.47 in all
    assert last(0.6, 0.5, ChainRule()) == 7  # sure enough beside an anchor that is itself unsure


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
