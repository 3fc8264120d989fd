"""The predictor on a session that records what it is fed and answers from a formula."""

from typing import Any

import numpy as np
import pytest

from dbsam_deploy.core.contract import EMBEDDING_CHANNELS, NUM_MASK_TOKENS, Geometry, graph_specs
from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.core.imaging import Preprocessing, postprocess, preprocess, to_model_frame
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.session import check_feed

SIZE = 64
SIDE = SIZE // 4


class RecordingSession:
    """A `Session` in NumPy: a box's logits are positive inside it, token t adds t to them."""

    backend = "recording"

    def __init__(self) -> None:
        self.feeds: list[tuple[str, dict[str, Any]]] = []

    def run(self, graph: str, feed: dict[str, Any]) -> dict[str, Any]:
        check_feed(graph_specs(Geometry(SIZE))[graph], feed)
        self.feeds.append((graph, feed))
        if graph == "encoder":
            grid = SIZE // 16
            mean = feed["image"].mean(dtype=np.float32)
            shape = (1, EMBEDDING_CHANNELS, grid, grid)
            return {"image_embeddings": np.full(shape, mean, np.float32)}
        if graph == "decoder":
            boxes = feed["boxes"][0]
            logits = np.stack([box_logits(box) for box in boxes])[:, None]
            ious = (boxes[:, 2] / SIZE)[:, None].astype(np.float32)
        else:
            count = feed["point_coords"].shape[1]
            tokens = np.arange(NUM_MASK_TOKENS, dtype=np.float32)
            logits = np.broadcast_to(
                tokens[None, :, None, None] - 1.5, (count, NUM_MASK_TOKENS, SIDE, SIDE)
            ).copy()
            ious = np.tile(tokens / 10, (count, 1)).astype(np.float32)
        return {"low_res_masks": logits[None], "iou_predictions": ious[None]}

    @property
    def graphs(self) -> list[str]:
        return [graph for graph, _ in self.feeds]


def box_logits(box: np.ndarray) -> np.ndarray:
    centres = (np.arange(SIDE, dtype=np.float32) + 0.5) * 4
    inside_x = (centres > box[0]) & (centres < box[2])
    inside_y = (centres > box[1]) & (centres < box[3])
    return np.where(inside_y[:, None] & inside_x[None], np.float32(3), np.float32(-3))


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng().integers(0, 256, (30, 45, 3), dtype=np.uint8)


@pytest.fixture
def session() -> RecordingSession:
    return RecordingSession()


@pytest.fixture
def predictor(session: RecordingSession, image: np.ndarray) -> Predictor:
    ready = Predictor(session, Preprocessing(SIZE))
    ready.set_image(image)
    return ready


def test_boxes_reach_the_decoder_in_the_model_frame(
    predictor: Predictor, session: RecordingSession, image: np.ndarray
) -> None:
    boxes = np.array([[1, 2, 20, 25], [10, 5, 45, 30]])
    prediction = predictor.predict_boxes(boxes)
    how = Preprocessing(SIZE)
    assert session.graphs == ["encoder", "decoder"]
    np.testing.assert_array_equal(session.feeds[0][1]["image"], preprocess(image, how))
    scale = np.array([64 / 45, 43 / 30, 64 / 45, 43 / 30])
    np.testing.assert_allclose(session.feeds[1][1]["boxes"][0], boxes * scale, rtol=1e-6)
    expected = np.stack([box_logits(b) for b in to_model_frame(boxes, (30, 45), how)])[:, None]
    np.testing.assert_array_equal(prediction.logits, expected)
    np.testing.assert_array_equal(prediction.masks, postprocess(expected, (30, 45), how))
    assert prediction.masks.shape == (2, 1, 30, 45)
    assert prediction.ious.shape == (2, 1)


def test_masks_lie_where_the_box_is(predictor: Predictor) -> None:
    mask = predictor.predict_boxes(np.array([[10, 5, 35, 25]])).masks[0, 0]
    assert mask[9:21, 15:30].all()
    outside = mask.copy()
    outside[3:28, 8:38] = 0
    assert not outside.any()


def test_the_embedding_is_computed_once_an_image(
    predictor: Predictor, session: RecordingSession, image: np.ndarray
) -> None:
    first = predictor.predict_boxes(np.array([[1, 2, 20, 25]]))
    predictor.predict_boxes(np.array([[3, 2, 20, 25]]))
    predictor.set_image(255 - image)
    predictor.predict_boxes(np.array([[1, 2, 20, 25]]))
    assert session.graphs == ["encoder", "decoder", "decoder", "encoder", "decoder"]
    embeddings = [feed["image_embeddings"] for graph, feed in session.feeds if graph == "decoder"]
    np.testing.assert_array_equal(embeddings[0], embeddings[1])
    assert not np.array_equal(embeddings[1], embeddings[2])
    assert first.masks.any()


def test_points_end_with_no_point(predictor: Predictor, session: RecordingSession) -> None:
    coords = np.array([[[4, 5], [40, 20]], [[1, 1], [2, 2]]], np.float64)
    labels = np.array([[1, 0], [0, 1]])
    prediction = predictor.predict_prompts(point_coords=coords, point_labels=labels)
    graph, feed = session.feeds[-1]
    assert graph == "prompt_decoder"
    np.testing.assert_array_equal(feed["point_labels"], [[[1, 0, -1], [0, 1, -1]]])
    np.testing.assert_allclose(
        feed["point_coords"][0, :, :2], coords * [64 / 45, 43 / 30], rtol=1e-6
    )
    assert (feed["point_coords"][0, :, 2] == 0).all()
    assert (feed["has_mask_input"] == 0).all()
    assert (feed["mask_input"] == 0).all()
    # token 0 is the single mask
    np.testing.assert_array_equal(prediction.logits, np.full((2, 1, SIDE, SIDE), -1.5))
    assert not prediction.masks.any()


def test_box_corners_follow_the_points(predictor: Predictor, session: RecordingSession) -> None:
    predictor.predict_prompts(
        boxes=np.array([[4.5, 3, 36, 24]]),
        point_coords=np.array([[[9.0, 6.0]]]),
        point_labels=np.array([[1]]),
    )
    feed = session.feeds[-1][1]
    np.testing.assert_array_equal(feed["point_labels"], [[[1, 2, 3]]])
    expected = np.array([[9, 6], [4.5, 3], [36, 24]]) * [64 / 45, 43 / 30]
    np.testing.assert_allclose(feed["point_coords"][0, 0], expected, rtol=1e-6)


def test_multimask_returns_tokens_1_to_3(predictor: Predictor) -> None:
    prediction = predictor.predict_prompts(boxes=np.array([[1, 2, 20, 25]]), multimask=True)
    assert prediction.masks.shape == (1, 3, 30, 45)
    np.testing.assert_allclose(prediction.ious, [[0.1, 0.2, 0.3]])
    # logits -0.5, 0.5 and 1.5
    assert prediction.masks.any(axis=(2, 3)).tolist() == [[False, True, True]]


def test_an_earlier_mask_is_passed_on(predictor: Predictor, session: RecordingSession) -> None:
    earlier = predictor.predict_boxes(np.array([[1, 2, 20, 25]])).logits[:, 0]
    predictor.predict_prompts(boxes=np.array([[1, 2, 20, 25]]), mask_input=earlier)
    feed = session.feeds[-1][1]
    np.testing.assert_array_equal(feed["mask_input"][0, :, 0], earlier)
    np.testing.assert_array_equal(feed["has_mask_input"], [[1]])


def test_prompts_before_an_image_are_refused(session: RecordingSession) -> None:
    fresh = Predictor(session, Preprocessing(SIZE))
    with pytest.raises(InputError, match="set_image"):
        fresh.predict_boxes(np.array([[0, 0, 1, 1]]))
    with pytest.raises(InputError, match="set_image"):
        fresh.predict_prompts(boxes=np.array([[0, 0, 1, 1]]))
    assert session.feeds == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "no prompt"),
        ({"point_coords": np.zeros((1, 1, 2))}, "one is missing"),
        ({"point_labels": np.zeros((1, 1))}, "one is missing"),
        (
            {
                "boxes": np.array([[0, 0, 1, 1]] * 2),
                "point_coords": np.zeros((1, 1, 2)),
                "point_labels": np.ones((1, 1)),
            },
            "expected one each",
        ),
        ({"boxes": np.array([[0, 0, 46, 1]])}, "outside the image"),
        ({"boxes": np.array([[0, 0, 1, 1]]), "mask_input": np.zeros((1, 8, 8))}, "mask_input"),
        (
            {"boxes": np.array([[0, 0, 1, 1]]), "mask_input": np.full((1, SIDE, SIDE), np.nan)},
            "finite",
        ),
    ],
)
def test_unusable_prompts_never_reach_the_session(
    predictor: Predictor, session: RecordingSession, prompts: dict[str, Any], message: str
) -> None:
    before = len(session.feeds)
    with pytest.raises(InputError, match=message):
        predictor.predict_prompts(**prompts)
    assert len(session.feeds) == before


@pytest.mark.parametrize("failure", ["image", "runtime"])
def test_a_failed_image_leaves_the_old_one_whole(
    predictor: Predictor, image: np.ndarray, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    box = np.array([[1, 2, 20, 25]])
    expected = predictor.predict_boxes(box).masks

    def broken(graph: str, feed: dict[str, Any]) -> dict[str, Any]:
        raise EngineError("out of memory")

    with monkeypatch.context() as patch:
        if failure == "runtime":
            patch.setattr(predictor.session, "run", broken)
        other = np.zeros((70, 20, 3), np.float32 if failure == "image" else np.uint8)
        with pytest.raises((InputError, EngineError)):
            predictor.set_image(other)
    np.testing.assert_array_equal(predictor.predict_boxes(box).masks, expected)


def test_lists_are_prompts_too(predictor):
    predictor.set_image(np.arange(6000).astype(np.uint8).reshape(40, 50, 3))
    boxes, coords, labels = [[1, 2, 20, 25]], [[[4, 5], [6, 7]]], [[1, 0]]
    np.testing.assert_array_equal(
        predictor.predict_boxes(boxes).logits, predictor.predict_boxes(np.array(boxes)).logits
    )
    prompts = {"boxes": boxes, "point_coords": coords, "point_labels": labels}
    arrays = {name: np.array(value) for name, value in prompts.items()}
    np.testing.assert_array_equal(
        predictor.predict_prompts(**prompts).logits, predictor.predict_prompts(**arrays).logits
    )


def test_a_forgotten_image_is_encoded_again(
    predictor: Predictor, session: RecordingSession, image: np.ndarray
) -> None:
    def encoded() -> int:
        return [graph for graph, _ in session.feeds].count("encoder")

    before = encoded()
    predictor.set_image(image)
    assert encoded() == before
    predictor.forget_images()
    with pytest.raises(InputError, match="set_image"):
        predictor.predict_boxes(np.array([[1, 2, 20, 25]]))
    predictor.set_image(image)
    assert encoded() == before + 1
