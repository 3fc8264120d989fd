"""Points for weights that know boxes: which boxes are tried, which answer is taken."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from support.box_trained import HOW, SIZE, BoxTrainedDecoder, blocks

from dbsam_deploy.core.contract import MAX_PROMPTS
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import Preprocessing, logit_at, postprocess, upscale_logits
from dbsam_deploy.core.points import (
    BOX_TRAINED,
    KINDS,
    NATIVE,
    PointRules,
    record_of,
    rules_of,
    usual_record,
)
from dbsam_deploy.core.prompt_adapter import MAX_SEARCHES, PromptAdapter
from dbsam_deploy.core.prompts import join_prompts
from dbsam_deploy.core.requests import planned_sets, read_prompts

IN_BOX_NATIVE = PointRules(first="search", past_box="search")
SINGLE, SEVERAL, ALL = slice(0, 1), slice(1, 4), slice(0, 4)


def answer(decoder, *, points=(), labels=None, box=None, earlier=None, rules=BOX_TRAINED, **how):
    """Masks (M, H, W) and IoU (M,) of one prompt set, and the plan."""
    tokens = how.pop("tokens", SINGLE)
    given = {} if box is None else {"boxes": np.array([box], float)}
    if len(points):
        marks = np.ones(len(points), int) if labels is None else labels
        given |= {"point_coords": np.array([points], float), "point_labels": np.array([marks])}
    coords, marks = join_prompts(SIZE, **given)
    masks = None if earlier is None else np.where(earlier, 1, -1).astype(np.float32)[None]
    flags = None if earlier is None else np.ones(1)
    plan = planned_sets(coords, marks, masks, flags, SIZE, HOW, tokens=tokens, rules=rules)
    low, iou = plan.decoded(range(1), decoder, PromptAdapter(HOW, SIZE, decoder, **how))
    return postprocess(low[0], SIZE, HOW) != 0, iou[0], plan


OBJECT, OTHER = (20, 16, 32, 30), (44, 40, 60, 60)


def test_a_click_finds_the_object_that_the_decoder_alone_does_not():
    decoder = BoxTrainedDecoder(blocks(OBJECT, OTHER))
    raw, _, _ = answer(decoder, points=[(25.5, 20.5)], rules=NATIVE)
    assert not raw.any()
    masks, iou, plan = answer(decoder, points=[(25.5, 20.5)])
    np.testing.assert_array_equal(masks[0], blocks(OBJECT))
    assert iou == 1
    assert plan.work == 6
    masks, _, _ = answer(decoder, points=[(50, 50), (58.5, 58.5)])
    np.testing.assert_array_equal(masks[0], blocks(OTHER))


def test_boxes_are_tried_where_the_image_lies_in_the_models_frame():
    decoder, size = BoxTrainedDecoder(blocks(OBJECT, OTHER)), (128, 128)  # the model sees half
    coords, labels = join_prompts(
        size, point_coords=np.array([[[51.0, 41.0]]]), point_labels=np.array([[1]])
    )
    plan = planned_sets(*(coords, labels, None, None, size, HOW), tokens=SINGLE, rules=BOX_TRAINED)
    low, _ = plan.decoded(range(1), decoder, PromptAdapter(HOW, size, decoder))
    np.testing.assert_array_equal(low[0, 0] > 0, blocks(OBJECT))


def test_a_bounded_number_of_boxes_is_decoded_at_once():
    for at_once in (6, 3):
        decoder = BoxTrainedDecoder(blocks(OBJECT))
        masks, _, _ = answer(decoder, points=[(25, 20)], at_once=at_once)
        assert masks.any()
        assert {graph for graph, _ in decoder.asked} == {"decoder"}
        counts = [count for _, count in decoder.asked]
        assert sum(counts) == 6
        assert max(counts) == at_once


def test_every_answer_holds_the_click_where_anything_is_found(rng):
    for _ in range(40):
        bright = ndimage.binary_opening(rng.random(SIZE) > 0.35)
        row, column = rng.integers(0, 64, 2)
        decoder = BoxTrainedDecoder(bright)
        masks, _, _ = answer(decoder, points=[(column + 0.5, row + 0.5)], tokens=SEVERAL)
        assert masks[:, row, column].all() == bright[row, column]
        if not bright[row, column]:  # no box gives what is not there: the decoder's own answer
            assert not masks.any()
            assert decoder.asked[-1] == ("prompt_decoder", 1)


def test_a_point_outside_keeps_the_search_off_it():
    decoder = BoxTrainedDecoder(blocks((10, 10, 50, 50)))
    alone, _, _ = answer(decoder, points=[(20.5, 20.5)])
    assert alone[0, 20, 27]
    masks, _, _ = answer(decoder, points=[(20.5, 20.5), (27.5, 20.5)], labels=[1, 0])
    assert masks[0, 20, 20]
    assert not masks[0, 20, 27]


def test_alternatives_differ_and_the_surest_comes_first():
    decoder = BoxTrainedDecoder(blocks(OBJECT, (20, 34, 32, 48)))
    single, iou, _ = answer(decoder, points=[(25.5, 20.5)])
    several, ious, _ = answer(decoder, points=[(25.5, 20.5)], tokens=SEVERAL)
    whole, all_ious, _ = answer(decoder, points=[(25.5, 20.5)], tokens=ALL)
    np.testing.assert_array_equal(several[0], single[0])
    np.testing.assert_array_equal(whole, np.concatenate([single, several]))
    np.testing.assert_array_equal(all_ious, [*iou, *ious])
    assert ious.argmax() == 0
    assert len(np.unique(several, axis=0)) == 3
    assert several[:, 20, 25].all()


def test_where_all_answers_are_alike_the_last_is_repeated():
    decoder = BoxTrainedDecoder(blocks((31, 31, 32, 32)))
    several, ious, _ = answer(decoder, points=[(31.5, 31.5)], tokens=SEVERAL)
    assert several.shape == (3, *SIZE)
    assert len(np.unique(several, axis=0)) == 1
    assert len(set(ious.tolist())) == 1


def test_a_click_past_its_box_grows_the_object():
    decoder = BoxTrainedDecoder(blocks((10, 20, 50, 40), OTHER))
    box = (10, 20, 36, 40)
    raw, _, _ = answer(decoder, box=box, points=[(48, 30)], rules=NATIVE)
    assert not raw[0, 30, 48]
    masks, _, plan = answer(decoder, box=box, points=[(48, 30)])
    assert masks[0, 30, 48]
    assert masks[0].sum() >= 40 * 20
    assert plan.searches[0].boxes[0].tolist() == list(box)


def test_an_earlier_mask_without_a_box_is_what_the_next_click_corrects():
    decoder = BoxTrainedDecoder(blocks((10, 20, 50, 40)))
    first = blocks((10, 20, 30, 40))
    masks, _, _ = answer(decoder, points=[(15, 25), (45, 30)], earlier=first)
    np.testing.assert_array_equal(masks[0], blocks((10, 20, 50, 40)))
    masks, _, plan = answer(
        decoder, points=[(25.5, 30.5)], labels=[0], earlier=first, rules=IN_BOX_NATIVE
    )
    assert masks[0, 25, 12]
    assert not masks[0, 30, 25]
    assert plan.work == 1
    assert decoder.asked[-1] == ("prompt_decoder", 1)


def test_a_point_outside_in_a_box_is_the_decoders_unless_its_rules_say_otherwise():
    decoder = BoxTrainedDecoder(blocks((10, 20, 50, 40)))
    box, place = (10, 20, 50, 40), [(48.5, 30.5)]
    raw, _, plan = answer(decoder, box=box, points=place, labels=[0], rules=IN_BOX_NATIVE)
    assert plan.work == 1
    assert not raw[0, 30, 48]
    masks, _, plan = answer(decoder, box=box, points=place, labels=[0], rules=BOX_TRAINED)
    assert plan.work == 6
    assert not masks[0, 30, 48]


def test_a_box_whose_own_mask_obeys_its_points_is_not_corrected():
    ring = blocks((10, 20, 50, 40))
    ring[29:31, 29:31] = False
    box = (10, 20, 50, 40)
    hole = [(30.0, 30.0)]
    masks, iou, plan = answer(BoxTrainedDecoder(ring), box=box, points=hole, labels=[0])
    assert plan.work == 6
    np.testing.assert_array_equal(masks[0], ring)
    assert iou == 1


BOX = (10.0, 20.0, 40.0, 40.0)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"box": BOX}, ""),
        ({"box": BOX, "points": [(20, 30)]}, ""),
        ({"box": BOX, "points": [(10, 20), (40, 40)]}, ""),  # a border is inside
        ({"points": [(20, 30)], "labels": [0]}, ""),
        ({"box": BOX, "points": [(20, 30)], "labels": [-1]}, ""),
        ({"points": [(20, 30)]}, "first"),
        ({"points": [(20, 30), (9, 9)], "labels": [1, 0]}, "first"),
        ({"points": [(20, 30)], "earlier": np.zeros(SIZE, bool)}, "first"),
        ({"box": BOX, "points": [(41, 30)]}, "past_box"),
        ({"box": BOX, "points": [(20, 30), (41, 30), (5, 5)], "labels": [1, 1, 0]}, "past_box"),
        ({"box": BOX, "points": [(20, 30)], "labels": [0]}, "in_box"),
        ({"box": BOX, "points": [(20, 30), (22, 30)], "labels": [0, 1]}, "in_box"),
    ],
    ids=str,
)
def test_each_kind_is_searched_by_its_own_rule(given, kind):
    decoder = BoxTrainedDecoder(blocks((5, 10, 45, 50)))
    for searched in KINDS:
        _, _, plan = answer(decoder, rules=PointRules(**{searched: "search"}), **given)
        assert bool(plan.searches) == (searched == kind)


def test_searched_and_other_sets_of_a_request_keep_their_order():
    decoder = BoxTrainedDecoder(blocks(OBJECT, OTHER))
    points = np.array([[[25.5, 20.5]], [[1, 1]], [[50, 50]]])
    coords, labels = join_prompts(SIZE, point_coords=points, point_labels=np.array([[1], [0], [1]]))
    plan = planned_sets(*(coords, labels, None, None, SIZE, HOW), tokens=SINGLE, rules=BOX_TRAINED)
    assert list(plan.searches) == [0, 2]
    low, iou = plan.decoded(range(3), decoder, PromptAdapter(HOW, SIZE, decoder))
    masks = postprocess(low, SIZE, HOW)[:, 0] != 0
    for mask, expected in zip(masks, (blocks(OBJECT), blocks(), blocks(OTHER)), strict=True):
        np.testing.assert_array_equal(mask, expected)
    assert iou[:, 0].tolist() == [1, 0, 1]
    part, _ = plan.decoded(range(2, 3), decoder, PromptAdapter(HOW, SIZE, decoder))
    np.testing.assert_array_equal(part, low[2:])


def request(count: int) -> dict[str, np.ndarray]:
    coords, labels = join_prompts(
        SIZE, point_coords=np.full((count, 1, 2), 20.0), point_labels=np.ones((count, 1), int)
    )
    return {"point_coords": coords, "point_labels": labels}


def test_a_request_decodes_no_more_than_one_of_boxes():
    assert read_prompts(request(MAX_SEARCHES), SIZE, HOW, BOX_TRAINED).work <= MAX_PROMPTS
    with pytest.raises(InputError, match=r"43 prompt sets .* 258 boxes .* at most 256"):
        read_prompts(request(43), SIZE, HOW, BOX_TRAINED)
    assert read_prompts(request(MAX_PROMPTS), SIZE, HOW).work == MAX_PROMPTS
    raw = {**request(MAX_PROMPTS), "adapt_points": np.zeros(1, np.uint8)}
    assert read_prompts(raw, SIZE, HOW, BOX_TRAINED).work == MAX_PROMPTS


@pytest.mark.parametrize("value", [np.uint8([2]), np.uint8([0, 0])], ids=str)
def test_an_unusable_flag_is_refused(value):
    with pytest.raises(InputError, match=r"adapt_points .*: expected \[0\] or \[1\]"):
        read_prompts({**request(1), "adapt_points": value}, SIZE, HOW, BOX_TRAINED)


@pytest.mark.parametrize("how", [HOW, Preprocessing(64), Preprocessing(64, "medsam")], ids=str)
def test_a_logit_of_one_pixel_is_that_of_the_whole_image(how, rng):
    size = (37, 90)
    low = rng.standard_normal((how.mask_side, how.mask_side)).astype(np.float32)
    whole = upscale_logits(low, size, how)
    for row, column in [(0, 0), (36, 89), (20, 41), (36, 0)]:
        assert logit_at(low, size, how, row, column) == whole[row, column]


def test_rules_are_read_strictly():
    record = BOX_TRAINED.record("said so", measured={"first": {}})
    assert rules_of(record) == BOX_TRAINED
    for wrong in ({"first": "maybe"}, {"past_box": None}, {"in_box": True}):
        with pytest.raises(InputError, match="expected native or search"):
            rules_of({**record, **wrong})
    with pytest.raises(InputError, match="points, in_box: None"):
        rules_of({"first": "search", "past_box": "native"})


def test_weights_are_taken_by_their_kind_until_they_are_measured():
    assert rules_of(usual_record("lite_medsam", trained=True)) == BOX_TRAINED
    assert rules_of(usual_record("sam_vit_b", trained=True)) == NATIVE
    assert rules_of(usual_record("db_sam", trained=False)) == NATIVE
    old = record_of({"trained": True}, "db_sam_tiny", "measure it so")
    assert rules_of(old) == BOX_TRAINED
    assert "does not say how its weights take points" in old["note"]
    assert old["note"].endswith("measure it so")
    new = record_of({"trained": True, "points": NATIVE.record("measured")}, "db_sam_tiny", "")
    assert (rules_of(new), "note" in new) == (NATIVE, False)
