"""`dbsam_interactive` on the real server: kept images, bounded work, requests that cannot kill."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from support.serving import processes_of, wait_until
from support.triton_calls import ask, metrics
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.core.image_id import image_id
from dbsam_deploy.core.masks import unpack_masks
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.serving.repository import build_repository
from dbsam_deploy.serving.server import Ports, TritonServer
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession

pytestmark = pytest.mark.triton

BOX = np.array([[2, 3, 30, 25]], np.float32)
MANY = np.repeat(BOX, 200, 0)


def new_image(*size: int) -> np.ndarray:
    return np.random.default_rng().integers(0, 256, (*(size or (40, 33)), 3), dtype=np.uint8)


def by_id(image: np.ndarray) -> np.ndarray:
    return np.array([image_id(image).encode()], object)


def local(artefact, image) -> Predictor:
    predictor = Predictor(OnnxRuntimeSession(artefact), artefact.preprocessing)
    predictor.set_image(image)
    return predictor


@pytest.fixture(scope="module")
def small(tiny_artefact, server_environment, tmp_path_factory):
    """A server whose front keeps 16 embeddings, lets 3 requests wait and decodes box by box."""
    root = tmp_path_factory.mktemp("small") / "repository"
    build_repository(tiny_artefact, root)
    config = root / "dbsam_interactive/config.pbtxt"
    text = config.read_text()
    tuned = {
        "cache_mib": (512, 1),
        "max_waiting": (32, 3),
        "image_workers": (2, 1),
        "chunk": (8, 1),
    }
    for name, (default, value) in tuned.items():
        old = f'"{name}" value {{ string_value: "{default}" }}'
        assert old in text
        text = text.replace(old, f'"{name}" value {{ string_value: "{value}" }}')
    config.write_text(text)
    log = tmp_path_factory.mktemp("small_log") / "log"
    with TritonServer(root, server_environment, log=log, ports=Ports(0, 0, 0)) as server:
        yield server


@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_a_known_image_is_prompted_by_its_id_bit_for_bit(triton, tiny_artefact, transport):
    url = triton.grpc_url if transport == "grpc" else triton.http_url
    image = new_image()
    assert wait_until(lambda: not metrics(triton.metrics_url)["dbsam_requests_in_flight"])
    before = metrics(triton.metrics_url)
    opened = ask(url, {"raw_image": image}, ("image_id", "cached"), transport=transport)
    assert (opened["image_id"][0], opened["cached"][0]) == (image_id(image).encode(), 0)
    asked = {"image_id": opened["image_id"], "boxes": MANY[:20]}
    wanted = ("masks", "iou_scores", "low_res_logits", "cached", "masks_packed")
    answer = ask(url, asked, wanted, transport=transport)
    expected = local(tiny_artefact, image).predict_boxes(MANY[:20])
    np.testing.assert_array_equal(answer["masks"], expected.masks)
    np.testing.assert_array_equal(answer["iou_scores"], expected.ious)
    np.testing.assert_array_equal(answer["low_res_logits"], expected.logits)
    packed = unpack_masks(answer["masks_packed"][0], expected.masks.shape)
    np.testing.assert_array_equal(packed, expected.masks)
    assert answer["cached"][0] == 1
    again = ask(url, {"raw_image": image, "boxes": BOX}, ("masks",), transport=transport)
    np.testing.assert_array_equal(again["masks"], expected.masks[:1])

    def grown() -> dict[str, float]:
        after = metrics(triton.metrics_url)
        return {name.removeprefix("dbsam_"): after[name] - before[name] for name in after}

    assert wait_until(lambda: grown()["requests_total"] == 3 and not grown()["requests_in_flight"])
    assert (grown()["cache_misses_total"], grown()["cache_hits_total"]) == (1, 2)
    assert grown()["cache_bytes"] == 256 * 8 * 8 * 4


@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_an_image_that_is_not_kept_is_not_found(triton, transport):
    url = triton.grpc_url if transport == "grpc" else triton.http_url
    with pytest.raises(InferenceServerException, match=r"not kept \(any more\)") as caught:
        ask(url, {"image_id": by_id(new_image()), "boxes": BOX}, transport=transport)
    assert caught.value.status() in ("StatusCode.NOT_FOUND", "404")


def test_many_clients_with_one_new_image_encode_it_once(triton, tiny_artefact):
    image = new_image(90, 70)
    before = metrics(triton.metrics_url)["dbsam_cache_misses_total"]
    with ThreadPoolExecutor(8) as pool:
        asked = [{"raw_image": image, "boxes": BOX}] * 8
        answers = list(pool.map(lambda one: ask(triton.grpc_url, one, ("masks",)), asked))
    expected = local(tiny_artefact, image).predict_boxes(BOX).masks
    for answer in answers:
        np.testing.assert_array_equal(answer["masks"], expected)
    assert wait_until(lambda: metrics(triton.metrics_url)["dbsam_cache_misses_total"] == before + 1)


def test_a_storm_of_evictions_gives_right_masks_or_not_found(small, tiny_artefact):
    images = [new_image() for _ in range(24)]
    expected = [local(tiny_artefact, image).predict_boxes(BOX).masks for image in images]

    def work(index: int) -> str:
        try:
            found = ask(small.grpc_url, {"image_id": by_id(images[index]), "boxes": BOX})
            kind = "kept"
        except InferenceServerException as error:
            if error.status() != "StatusCode.NOT_FOUND":
                raise
            sent = {"raw_image": images[index], "boxes": BOX}
            found, kind = ask(small.grpc_url, sent), "sent"
        np.testing.assert_array_equal(found["masks"], expected[index])
        return kind

    with ThreadPoolExecutor(3) as pool:  # as many as may wait
        order = np.random.default_rng(0).integers(0, 24, 150)
        kinds = list(pool.map(work, order.tolist()))
    assert set(kinds) == {"kept", "sent"}
    seen = metrics(small.metrics_url)
    assert seen["dbsam_cache_bytes"] <= 1 << 20
    assert seen["dbsam_cache_images"] <= 16
    assert seen["dbsam_cache_evictions_total"] > 10


def test_a_client_sends_an_open_image_again_that_was_really_dropped(small, tiny_artefact):
    images = [new_image() for _ in range(18)]  # two more than are kept
    with DbsamClient(small.grpc_url) as client:
        opened = [client.open(image) for image in images]
        for number, was_kept in ((17, True), (0, False), (0, True)):
            answer = opened[number].predict(boxes=BOX)
            expected = local(tiny_artefact, images[number]).predict_boxes(BOX).masks
            np.testing.assert_array_equal(answer.masks, expected)
            assert opened[number].known.cached is was_kept


def test_more_requests_than_may_wait_are_shed_at_once(small, tiny_artefact):
    image = new_image()
    expected = local(tiny_artefact, image).predict_boxes(MANY).masks
    ask(small.grpc_url, {"raw_image": image}, ("image_id",))

    def work(_: int) -> tuple[str, float]:
        start = time.monotonic()
        try:
            answer = ask(small.grpc_url, {"raw_image": image, "boxes": MANY}, ("masks",))
        except InferenceServerException as error:
            return str(error), time.monotonic() - start
        np.testing.assert_array_equal(answer["masks"], expected)
        return "answered", time.monotonic() - start

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(work, range(16)))
    busy = re.compile(r"UNAVAILABLE\] busy: 3 requests wait, at most 3 .*; retry after \d+ ms")
    shed = [took for text, took in results if busy.search(text)]
    answered = [took for text, took in results if text == "answered"]
    assert len(shed) + len(answered) == 16
    assert 1 <= len(answered) <= 8
    assert max(shed) < max(answered)


@pytest.mark.parametrize("model", ["dbsam_interactive", "dbsam"])
def test_clients_that_gave_up_cost_no_work(small, model):
    """Their deadline travels with the request: what waits when it passes is not computed."""
    assert wait_until(lambda: not metrics(small.metrics_url)["dbsam_requests_in_flight"])
    before = metrics(small.metrics_url)
    long = {"raw_image": new_image(700, 700), "boxes": np.repeat(BOX, 256, 0)}

    def give_up(_: int) -> bool:
        sent = {"raw_image": new_image(), "boxes": BOX}
        limits = {"timeout_us": 50_000, "client_timeout_s": 0.5}
        with pytest.raises(InferenceServerException):
            ask(small.grpc_url, sent, ("masks",), model=model, **limits)
        return True

    def grown() -> dict[str, float]:
        after = metrics(small.metrics_url)
        return {name.removeprefix("dbsam_"): after[name] - before[name] for name in after}

    with ThreadPoolExecutor(4) as pool:
        worked = pool.submit(ask, small.grpc_url, long, ("masks",))
        assert wait_until(lambda: grown()["requests_in_flight"] == 1)
        assert all(pool.map(give_up, range(3)))
        assert worked.result()["masks"].shape == (256, 1, 700, 700)
    assert wait_until(lambda: grown()["requests_total"] == 4 and not grown()["requests_in_flight"])
    assert grown()["requests_late_total"] + grown()["requests_cancelled_total"] == 3
    assert grown()["cache_misses_total"] == 1, "that of the one who waited"


def rpc(url: str, model: str, tensors: list[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    """The status of a gRPC request that is written by hand."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, datatype, shape, raw in tensors:
        item = request.inputs.add(name=name, datatype=datatype)
        item.shape.extend(shape)
        request.raw_input_contents.append(raw)
    with grpc.insecure_channel(url) as channel:
        try:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=10)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def post(url: str, model: str, inputs: list[dict]) -> int:
    """The status of an HTTP request that is written by hand."""
    request = urllib.request.Request(
        f"http://{url}/v2/models/{model}/infer",
        data=json.dumps({"inputs": inputs}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - loopback
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("model", ["dbsam", "dbsam_prompts", "dbsam_interactive", "dbsam_decoder"])
def test_shapes_whose_size_overflows_are_refused_and_no_process_ends(triton, model):
    """Triton counts bytes modulo 2^64, so it passes these on without data."""
    stubs = sorted(processes_of(triton.pid))
    huge = {"name": "raw_image", "shape": [2**33, 2**31, 3], "datatype": "UINT8", "data": [1, 2]}
    box = ("boxes", "FP32", (1, 4), BOX.tobytes())
    wrap = ("boxes", "FP32", (2**60, 4), b"")
    if model == "dbsam_decoder":
        embedding = ("image_embeddings", "FP32", (1, 256, 8, 8), bytes(256 * 64 * 4))
        assert rpc(triton.grpc_url, model, [embedding, ("boxes", "FP32", (1, 2**60, 4), b"")]) == (
            "INVALID_ARGUMENT"
        )
    elif model == "dbsam_prompts":
        tensors = [
            ("raw_image", "UINT8", (40, 33, 3), new_image().tobytes()),
            ("point_coords", "FP32", (2**31, 2**30, 2), b""),
            ("point_labels", "INT32", (2**31, 2**31), b""),
            ("mask_input", "FP32", (2**52, 32, 32), b""),
            ("has_mask_input", "FP32", (2**62,), b""),
        ]
        assert rpc(triton.grpc_url, model, tensors) == "INVALID_ARGUMENT"
    else:
        inputs = [
            huge,
            {"name": "boxes", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 9, 9]},
        ]
        assert post(triton.http_url, model, inputs) == 400
        image = ("raw_image", "UINT8", (40, 33, 3), new_image().tobytes())
        assert rpc(triton.grpc_url, model, [image, wrap]) == "INVALID_ARGUMENT"
        image = ("raw_image", "UINT8", (2**33, 2**31, 3), b"")
        assert rpc(triton.grpc_url, model, [image, box]) == "INVALID_ARGUMENT"
    assert sorted(processes_of(triton.pid)) == stubs
    assert ask(triton.grpc_url, {"raw_image": new_image(), "boxes": BOX})["masks"].shape == (
        1,
        1,
        40,
        33,
    )
