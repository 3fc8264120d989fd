"""Images that a server keeps: asked for by id, sent where it lacks them, equal to local masks."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.scripted_server import scripted_server

import dbsam_deploy as db
from dbsam_deploy.clients.async_client import AsyncDbsamClient
from dbsam_deploy.clients.calls import load_library
from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.clients.known_images import KnownImage, check_opened, known_result
from dbsam_deploy.core.errors import InputError, NotKeptError, ServingError
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession

WAYS = [
    pytest.param(protocol, {"shared_memory": shared, "packed": packed}, id=f"{protocol}-{name}")
    for protocol in ("grpc", "http")
    for name, shared, packed in (("plain", False, False), ("packed", False, True), ("shm", True, 0))
]
BOXES = np.array([[3, 4, 40, 30], [10, 5, 55, 41]], np.float32)
POINTS = {"point_coords": np.array([[[30, 20], [2, 2]]]), "point_labels": np.array([[1, 0]])}


@pytest.fixture
def image():
    """One that no server has seen."""
    return np.random.default_rng().integers(0, 256, (45, 61, 3), dtype=np.uint8)


@pytest.fixture
def predictor(tiny_artefact, image):
    local = Predictor(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)
    local.set_image(image)
    return local


def url_of(triton, protocol):
    return triton.grpc_url if protocol == "grpc" else triton.http_url


def sent(monkeypatch, client, *answers):
    """Names of the inputs of each request; `answers` are raised in place of the first ones."""
    requests, honest, planned = [], client._client.infer, list(answers)

    def infer(model, inputs, **options):
        requests.append([tensor.name() for tensor in inputs])
        error = planned.pop(0) if planned else None
        if error is not None:
            raise error
        return honest(model, inputs, **options)

    monkeypatch.setattr(client._client, "infer", infer)
    return requests


def check_equal(answer, expected, *, logits):
    np.testing.assert_array_equal(answer.masks, expected.masks)
    np.testing.assert_array_equal(answer.ious, expected.ious)
    assert answer.masks.dtype == np.uint8
    if logits:
        np.testing.assert_array_equal(answer.logits, expected.logits)
    else:
        assert answer.logits is None


def cases(predictor):
    """Prompts, and what the model in this process says."""
    first = predictor.predict_prompts(**POINTS, multimask=True)
    again = {**POINTS, "mask_input": first.logits[:, 1]}
    return [
        ({"boxes": BOXES}, predictor.predict_boxes(BOXES)),
        (POINTS, predictor.predict_prompts(**POINTS)),
        ({**POINTS, "multimask": True}, first),
        (again, predictor.predict_prompts(**again)),
        (
            {"boxes": BOXES, "multimask": True},
            predictor.predict_prompts(boxes=BOXES, multimask=True),
        ),
    ]


@pytest.mark.triton
@pytest.mark.parametrize(("protocol", "options"), WAYS)
def test_masks_of_an_open_image_equal_local_ones(triton, predictor, image, protocol, options):
    url = url_of(triton, protocol)
    with DbsamClient(url, protocol, key=triton.key, **options) as client:
        opened = client.open(image)
        assert opened.known.cached is False
        for number, (prompts, expected) in enumerate(cases(predictor)):
            logits = number % 2 == 1
            check_equal(opened.predict(**prompts, logits=logits), expected, logits=logits)
            assert opened.known.cached is True
        assert client.open(image).known.cached is True


@pytest.mark.triton
@pytest.mark.parametrize(("protocol", "options"), WAYS)
def test_the_same_by_asyncio(triton, predictor, image, protocol, options):
    async def ask():
        url = url_of(triton, protocol)
        async with AsyncDbsamClient(url, protocol, key=triton.key, **options) as client:
            opened = await client.open(image)
            return await asyncio.gather(
                *(opened.predict(**prompts, logits=True) for prompts, _ in cases(predictor))
            )

    for answer, (_, expected) in zip(asyncio.run(ask()), cases(predictor), strict=True):
        check_equal(answer, expected, logits=True)


@pytest.mark.triton
def test_an_image_is_sent_once_and_again_only_where_it_was_dropped(
    triton, predictor, image, monkeypatch
):
    with DbsamClient(triton.grpc_url) as client:
        requests = sent(monkeypatch, client)
        opened = client.take(image)
        assert requests == []
        opened.predict(boxes=BOXES)
        assert requests == [["image_id", "boxes"], ["raw_image", "boxes"]]
        assert opened.known.cached is False
        opened.predict(boxes=BOXES)
        assert requests[2:] == [["image_id", "boxes"]]
        opened.predict(**POINTS)
        assert requests[3:] == [["image_id", "point_coords", "point_labels", "multimask_tokens"]]
        assert opened.known.cached is True
        refused = load_library("tritonclient.utils").InferenceServerException
        dropped = refused(f"image_id {opened.known.id}: not kept (any more)", "NOT_FOUND")
        requests = sent(monkeypatch, client, dropped)
        check_equal(opened.predict(boxes=BOXES), predictor.predict_boxes(BOXES), logits=False)
        assert requests == [["image_id", "boxes"], ["raw_image", "boxes"]]
        sent(monkeypatch, client, dropped, dropped)
        with pytest.raises(NotKeptError):
            opened.predict(boxes=BOXES)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, "masks_packed"), ({"packed": False}, "masks"), ({"shared_memory": True}, "masks")],
)
def test_masks_come_packed_unless_through_shared_memory(
    triton, image, monkeypatch, options, expected
):
    with DbsamClient(triton.grpc_url, key=triton.key, **options) as client:
        opened, honest, wanted = client.open(image), client._client.infer, []

        def infer(*words, **more):
            wanted.extend(output.name() for output in more["outputs"])
            return honest(*words, **more)

        monkeypatch.setattr(client._client, "infer", infer)
        opened.predict(boxes=BOXES)
    assert [name for name in wanted if name.startswith("masks")] == [expected]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_balancer_sees_which_requests_are_on_one_image(protocol, image):
    """Clicks and the image itself carry the same few digits; a one-shot none."""
    with scripted_server(protocol) as script, DbsamClient(script.url, protocol) as client:
        script.refusals += [("NOT_FOUND", "image_id x: not kept (any more)")]
        for _ in range(2):
            with pytest.raises(ServingError):  # this server answers no such model
                client.take(image).predict(boxes=BOXES)
        client.segment(image, BOXES)
    known = KnownImage.of(image)
    assert [seen.image for seen in script.seen] == [*[known.id[:8]] * 3, ""]


@pytest.mark.triton
@pytest.mark.parametrize("scheme", ["triton", "triton+http"])
def test_a_loaded_server_encodes_an_image_once(triton, predictor, image, monkeypatch, scheme):
    url = url_of(triton, "http" if "http" in scheme else "grpc")
    with db.load(f"{scheme}://{url}") as model:
        requests = sent(monkeypatch, model.predictor.client)
        first = model.predict(image, boxes=BOXES)
        second = model.predict(image.copy(), points=[[30, 20]])
    assert ["raw_image" in names for names in requests] == [False, True, False]
    np.testing.assert_array_equal(first.masks, predictor.predict_boxes(BOXES).masks)
    expected = predictor.predict_prompts(
        point_coords=np.array([[[30, 20]]]), point_labels=np.array([[1]])
    )
    np.testing.assert_array_equal(second.masks, expected.masks)
    np.testing.assert_array_equal(second.logits, expected.logits)


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_threads_share_an_open_image(triton, predictor, image, protocol):
    expected = predictor.predict_boxes(BOXES)
    with DbsamClient(url_of(triton, protocol), protocol) as client, ThreadPoolExecutor(6) as pool:
        opened = client.open(image)
        for answer in pool.map(lambda _: opened.predict(boxes=BOXES), range(12)):
            check_equal(answer, expected, logits=False)


@pytest.mark.triton
def test_the_servers_refusals_are_told(triton, image):
    with DbsamClient(triton.grpc_url) as client:
        opened = client.open(image)
        with pytest.raises(InputError, match="outside the image"):
            opened.predict(boxes=BOXES + 100)
        known = KnownImage(image, "0" * 64)
        with pytest.raises(NotKeptError, match=r"request [0-9a-f]{12}\)$") as caught:
            list(iter_calls(client, known))
        assert str(caught.value).count("request") == 1


def iter_calls(client, known):
    """Run one request by id, without sending the image after it."""
    from dbsam_deploy.clients.client import _finish
    from dbsam_deploy.clients.known_images import open_call

    yield _finish(client._run(open_call(known), client._begin()))


@pytest.mark.parametrize("bad", [b"", b"no zlib", b"x\x9c\x03\x00\x00\x00\x00\x01"])
def test_damaged_packed_masks_are_the_servers_fault(image, bad):
    arrays = {
        "cached": np.ones(1, np.uint8),
        "iou_scores": np.zeros((1, 1), np.float32),
        "masks_packed": np.array([bad], object),
    }
    with pytest.raises(ServingError, match="packed masks"):
        known_result(arrays, KnownImage.of(image))


def test_a_server_that_calls_an_image_otherwise_is_refused(image):
    with pytest.raises(ServingError, match="this library's version"):
        check_opened({"image_id": np.array([b"0" * 64], object)}, KnownImage.of(image))
