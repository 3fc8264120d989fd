"""Encode once, prompt many: equal to local prediction, only what is asked for is computed."""

from __future__ import annotations

import numpy as np
import pytest
from support.prompt_sets import prompt_sets

from dbsam_deploy.core import imaging
from dbsam_deploy.core.embedding_cache import EmbeddingCache
from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.core.image_id import image_id
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.core.interactive import Interactive
from dbsam_deploy.core.masks import unpack_masks
from dbsam_deploy.core.points import BOX_TRAINED
from dbsam_deploy.core.refusal import RefusedError
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession

HOW = Preprocessing(128)
SIZE = (61, 90)
BOXES = np.array([[1, 2, 50.5, 40.25], [0, 0, 90, 60], [5, 5, 20, 20]], np.float32)
ALL = ("masks", "iou_scores", "low_res_logits", "image_id", "cached", "masks_packed", "box_masks")


def nothing() -> None:
    pass


class SessionGraphs:
    """The graphs of an export on ONNX Runtime; counts what was asked."""

    def __init__(self, artefact):
        self.session, self.encoded, self.decoded = OnnxRuntimeSession(artefact), 0, []

    def encode(self, feed):
        self.encoded += 1
        embedding = self.session.run("encoder", feed)["image_embeddings"]
        return embedding, embedding.nbytes

    def decode(self, graph, embedding, feed):
        self.decoded.append((graph, len(next(iter(feed.values())))))
        batch = {name: array[None] for name, array in feed.items()}
        found = self.session.run(graph, {"image_embeddings": embedding, **batch})
        return found["low_res_masks"][0], found["iou_predictions"][0]

    def mask_bits(self, feed):
        return self.session.run("mask_bits", feed)["mask_bits"]


@pytest.fixture
def image(rng):
    return rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)


@pytest.fixture
def front(tiny_artefact):
    return Interactive(HOW, SessionGraphs(tiny_artefact), EmbeddingCache(1 << 20), 2)


@pytest.fixture
def local(tiny_artefact, image):
    predictor = Predictor(OnnxRuntimeSession(tiny_artefact), HOW)
    predictor.set_image(image)
    return predictor


def test_boxes_are_answered_as_locally_in_chunks(front, local, image):
    answer = front.answer({"raw_image": image, "boxes": BOXES}, ALL, nothing)
    expected = local.predict_boxes(BOXES)
    assert front.graphs.decoded == [("decoder", 2), ("decoder", 1)]
    assert 0 < expected.masks.mean() < 1
    np.testing.assert_array_equal(answer["masks"], expected.masks)
    np.testing.assert_array_equal(answer["box_masks"], expected.masks[:, 0])
    np.testing.assert_array_equal(answer["iou_scores"], expected.ious)
    np.testing.assert_array_equal(answer["low_res_logits"], expected.logits)
    assert answer["image_id"][0] == image_id(image).encode()
    packed = answer["masks_packed"][0]
    np.testing.assert_array_equal(unpack_masks(packed, expected.masks.shape), expected.masks)


@pytest.mark.parametrize(
    "given",
    [
        {"boxes": BOXES},
        {
            "point_coords": np.tile(np.float32([[30, 20], [80, 50]]), (3, 1, 1)),
            "point_labels": np.tile(np.int32([1, 0]), (3, 1)),
        },
    ],
    ids=["boxes", "points"],
)
def test_prompt_sets_are_answered_as_locally_in_chunks(front, local, image, rng, given):
    mask_input = rng.standard_normal((3, 32, 32)).astype(np.float32)
    sets = prompt_sets(SIZE, mask_input, **given)
    answer = front.answer({"raw_image": image, **sets}, ALL, nothing)
    single = local.predict_prompts(**given, mask_input=mask_input)
    several = local.predict_prompts(**given, mask_input=mask_input, multimask=True)
    assert front.graphs.decoded == [("prompt_decoder", 2), ("prompt_decoder", 1)]
    np.testing.assert_array_equal(answer["masks"][:, :1], single.masks)
    np.testing.assert_array_equal(answer["masks"][:, 1:], several.masks)
    np.testing.assert_array_equal(answer["low_res_logits"][:, 1:], several.logits)
    assert "box_masks" not in answer
    for number, expected in enumerate((single, several)):
        named = {**sets, "multimask_tokens": np.array([number], np.uint8)}
        answer = front.answer({"raw_image": image, **named}, ALL, nothing)
        np.testing.assert_array_equal(answer["masks"], expected.masks)
        np.testing.assert_array_equal(answer["iou_scores"], expected.ious)
        np.testing.assert_array_equal(answer["low_res_logits"], expected.logits)
        packed = answer["masks_packed"][0]
        np.testing.assert_array_equal(unpack_masks(packed, expected.masks.shape), expected.masks)


CLICKS = {
    "point_coords": np.float32([[[30, 20], [80, 50]], [[60, 30], [5, 5]], [[88, 3], [0, 0]]]),
    "point_labels": np.int32([[1, 0], [1, 1], [1, -1]]),
}


@pytest.mark.parametrize("given", [CLICKS, {**CLICKS, "boxes": BOXES}], ids=["points", "boxes"])
@pytest.mark.parametrize("is_corrected", [False, True], ids=["new", "corrected"])
def test_points_that_boxes_are_tried_for_are_answered_as_locally(
    tiny_artefact, image, rng, given, is_corrected
):
    local = Predictor(OnnxRuntimeSession(tiny_artefact), HOW, points=BOX_TRAINED)
    local.set_image(image)
    front = Interactive(HOW, SessionGraphs(tiny_artefact), EmbeddingCache(1 << 20), 8, BOX_TRAINED)
    earlier = rng.standard_normal((3, 32, 32)).astype(np.float32)
    sets = prompt_sets(SIZE, earlier, **given)
    if is_corrected:
        given = {**given, "mask_input": earlier}
    else:
        sets["has_mask_input"][:] = 0
    single, several = (local.predict_prompts(**given, multimask=more) for more in (False, True))
    answer = front.answer({"raw_image": image, **sets}, ALL, nothing)
    for name, part in (("masks", "masks"), ("iou_scores", "ious"), ("low_res_logits", "logits")):
        expected = np.concatenate([getattr(single, part), getattr(several, part)], axis=1)
        np.testing.assert_array_equal(answer[name], expected)
    tried = [count for graph, count in front.graphs.decoded if graph == "decoder"]
    assert sum(tried) > 15
    assert max(tried) <= 8
    raw = {**sets, "adapt_points": np.zeros(1, np.uint8)}
    answer = front.answer({"raw_image": image, **raw}, ALL, nothing)
    expected = local.predict_prompts(**given, adapt_points=False)
    np.testing.assert_array_equal(answer["masks"][:, :1], expected.masks)
    assert not np.array_equal(expected.masks, single.masks)


def test_a_search_ends_with_its_client(tiny_artefact, image):
    front = Interactive(HOW, SessionGraphs(tiny_artefact), EmbeddingCache(1 << 20), 2, BOX_TRAINED)
    left = [None] * 3

    def gone():
        if not left:
            raise RefusedError("the client has gone: dropped", "CANCELLED")
        left.pop()

    sets = {name: array[2:] for name, array in CLICKS.items()}
    sets["point_labels"] = np.int32([[1, -1]])
    with pytest.raises(RefusedError):
        front.answer({"raw_image": image, **sets}, ALL, gone)
    assert len(front.graphs.decoded) < 3


def test_only_wanted_masks_are_made_of_logits(front, image, monkeypatch):
    made = []
    real = imaging.postprocess
    monkeypatch.setattr(
        "dbsam_deploy.core.graph_imaging.postprocess",
        lambda low, *how: made.append(low.shape[1]) or real(low, *how),
    )
    sets = {
        "point_coords": np.array([[[20, 30], [0, 0]]], np.float32),
        "point_labels": np.array([[1, -1]], np.int32),
    }
    for tokens in (np.zeros(1, np.uint8), np.ones(1, np.uint8), None):
        wanted = {} if tokens is None else {"multimask_tokens": tokens}
        front.answer({"raw_image": image, **sets, **wanted}, ALL, nothing)
    assert made == [1, 3, 4]


def test_a_known_image_is_not_encoded_again(front, image):
    boxes = {"boxes": BOXES[:1]}
    first = front.answer({"raw_image": image, **boxes}, ALL, nothing)
    by_id = front.answer({"image_id": first["image_id"], **boxes}, ALL, nothing)
    both = front.answer({"raw_image": image, "image_id": first["image_id"], **boxes}, ALL, nothing)
    assert front.graphs.encoded == 1
    assert [int(answer["cached"][0]) for answer in (first, by_id, both)] == [0, 1, 1]
    for answer in (by_id, both):
        np.testing.assert_array_equal(answer["masks"], first["masks"])


def test_the_lookup_comes_before_the_image_is_preprocessed(front, image, monkeypatch):
    front.answer({"raw_image": image}, ("image_id",), nothing)
    monkeypatch.setattr(
        "dbsam_deploy.core.interactive.encoder_feed", lambda *_: pytest.fail("preprocessed")
    )
    front.answer({"raw_image": image, "boxes": BOXES}, ("masks",), nothing)


def test_without_prompts_it_only_encodes(front, image):
    answer = front.answer({"raw_image": image}, ALL, nothing)
    assert set(answer) == {"image_id", "cached"}
    assert (front.graphs.encoded, front.graphs.decoded) == (1, [])


def test_only_what_is_wanted_is_computed(front, image, monkeypatch):
    arrays = {"raw_image": image, "boxes": BOXES}
    assert set(front.answer(arrays, ("masks",), nothing)) == {"masks"}
    packed = front.answer(arrays, ("masks_packed", "iou_scores"), nothing)
    assert set(packed) == {"masks_packed", "iou_scores"}
    monkeypatch.setattr(
        "dbsam_deploy.core.interactive.make_masks", lambda *_: pytest.fail("made masks")
    )
    logits = front.answer(arrays, ("low_res_logits", "cached"), nothing)
    assert set(logits) == {"low_res_logits", "cached"}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"boxes": BOXES}, "no image: send raw_image"),
        ({"image_id": np.array([b"xyz"], object)}, "'xyz': expected 64 hexadecimal"),
        ({"image_id": np.array([b"\xff" * 64], object)}, "expected 64 hexadecimal"),
        ({"image_id": np.array([b"A" * 64], object)}, "expected 64 hexadecimal"),
    ],
)
def test_mistakes_are_named(front, arrays, message):
    with pytest.raises(InputError, match=message):
        front.answer(arrays, ALL, nothing)


def test_an_id_of_another_image_is_refused(front, image):
    other = np.array([image_id(image[:-1]).encode()], object)
    with pytest.raises(InputError, match=r"is not that of raw_image"):
        front.answer({"raw_image": image, "image_id": other}, ALL, nothing)


def test_an_unknown_id_is_not_found(front):
    with pytest.raises(RefusedError, match=r"not kept \(any more\): send raw_image") as caught:
        front.answer({"image_id": np.array([b"0" * 64], object)}, ALL, nothing)
    assert caught.value.code == "NOT_FOUND"


def test_a_wrong_prompt_costs_no_encoding(front, image):
    with pytest.raises(InputError, match="reaches outside"):
        front.answer({"raw_image": image, "boxes": BOXES * 9}, ALL, nothing)
    assert front.graphs.encoded == 0


def test_an_image_of_one_colour_is_refused_each_time(front):
    arrays = {"raw_image": np.full((*SIZE, 3), 7, np.uint8), "boxes": BOXES}
    for _ in range(2):
        with pytest.raises(InputError, match="nothing to segment"):
            front.answer(arrays, ALL, nothing)


def test_who_has_gone_gets_nothing_more_computed(front, image):
    answers = iter([None, None])

    def check() -> None:
        if next(answers, "gone") == "gone":
            raise RefusedError("gone", "CANCELLED")

    with pytest.raises(RefusedError, match="gone"):
        front.answer({"raw_image": image, "boxes": BOXES}, ALL, check)
    assert front.graphs.decoded == [("decoder", 2)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("wanted", ["masks", "masks_packed", "low_res_logits"])
def test_logits_that_overflowed_are_the_engines_fault(front, image, value, wanted, monkeypatch):
    logits = np.zeros((2, 1, 32, 32), np.float32)
    logits[..., 3, 4] = value
    monkeypatch.setattr(front.graphs, "decode", lambda *_: (logits, logits[..., 0, 0]))
    with pytest.raises(EngineError, match="NaN or infinity"):
        front.answer({"raw_image": image, "boxes": BOXES}, (wanted,), nothing)


def test_packed_masks_of_another_size_or_damaged_are_refused(front, image):
    arrays = {"raw_image": image, "boxes": BOXES}
    packed = front.answer(arrays, ("masks_packed",), nothing)["masks_packed"][0]
    for wrong, shape in ((packed, (3, 1, 61, 91)), (packed[:-4], (3, 1, *SIZE)), (b"no", (1,))):
        with pytest.raises(InputError, match="ask for them again"):
            unpack_masks(wrong, shape)


def test_the_id_follows_pixels_and_shape():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    same = np.asfortranarray(image)
    assert image_id(image) == image_id(same) == image_id(image.copy())
    assert len({image_id(image), image_id(image.reshape(4, 2, 3)), image_id(image[::-1])}) == 3
    assert imaging.check_image(image) is image
