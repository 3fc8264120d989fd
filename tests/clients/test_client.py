"""The client: both transports, blocking and asyncio, shared memory; equal to local prediction."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbsam_deploy import client as client_door
from dbsam_deploy import predict as predict_door
from dbsam_deploy.cli import run
from dbsam_deploy.clients import calls as client_requests
from dbsam_deploy.clients import exchange
from dbsam_deploy.clients.async_client import AsyncDbsamClient
from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.clients.failures import translated
from dbsam_deploy.clients.retries import ServerRequest
from dbsam_deploy.core.errors import InputError, NoServerError, ServingError
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
WAYS = [("grpc", False), ("grpc", True), ("http", False), ("http", True)]
SIZES = [(128, 128), (77, 131), (300, 40), (1, 90), (64, 1), (1, 2)]


def regions() -> set[str]:
    return {path.name for path in SHARED_MEMORY.glob("dbsam_client_*")}


@pytest.fixture(autouse=True)
def no_leaked_regions():
    before = regions()
    yield
    assert regions() <= before


@pytest.fixture
def predictor(tiny_artefact):
    return Predictor(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)


def random_case(height: int, width: int, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image and `count` boxes inside it."""
    rng = np.random.default_rng()
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    low = rng.uniform(0, 0.4, (count, 2)) * (width, height)
    high = rng.uniform(0.6, 1, (count, 2)) * (width, height)
    return image, np.concatenate([low, high], axis=1).astype(np.float32)


def url_of(triton, protocol: str) -> str:
    return triton.grpc_url if protocol == "grpc" else triton.http_url


@pytest.mark.triton
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("protocol", "shared"), WAYS)
def test_ensemble_masks_equal_local_prediction_bit_for_bit(
    triton, predictor, protocol, shared, size
):
    image, boxes = random_case(*size)
    predictor.set_image(image)
    expected = predictor.predict_boxes(boxes)
    with DbsamClient(
        url_of(triton, protocol), protocol, shared_memory=shared, key=triton.key
    ) as client:
        answer = client.segment(image, boxes)
    np.testing.assert_array_equal(answer.masks, expected.masks)
    np.testing.assert_array_equal(answer.ious, expected.ious)
    assert answer.masks.dtype == np.uint8
    assert answer.masks.flags.writeable


@pytest.mark.triton
def test_masks_follow_image_and_box(triton):
    """Guards the comparison above against graphs that ignore their inputs."""
    image, boxes = random_case(100, 100)
    with DbsamClient(triton.grpc_url) as client:
        first = client.segment(image, boxes).masks
        assert 0.05 < first.mean() < 0.95
        assert not np.array_equal(first[0], first[1])
        assert not np.array_equal(first, client.segment(255 - image, boxes).masks)


@pytest.mark.triton
@pytest.mark.parametrize(("protocol", "shared"), WAYS)
def test_asyncio_answers_equal_local_prediction(triton, predictor, protocol, shared):
    cases = [random_case(20 + 9 * i, 90 - 7 * i, 1 + i % 3) for i in range(8)]

    async def ask():
        url = url_of(triton, protocol)
        async with AsyncDbsamClient(url, protocol, shared_memory=shared, key=triton.key) as client:
            return await asyncio.gather(*(client.segment(*case) for case in cases))

    answers = asyncio.run(ask())
    for (image, boxes), answer in zip(cases, answers, strict=True):
        predictor.set_image(image)
        np.testing.assert_array_equal(answer.masks, predictor.predict_boxes(boxes).masks)


def prompt_cases(size):
    image, boxes = random_case(*size, count=2)
    height, width = size
    points = np.array([[[0, 0], [width, height / 2]], [[width / 3, height], [9e9, -5]]], np.float32)
    labels = np.array([[1, 0], [1, -1]], np.int32)
    mask_input = np.random.default_rng().standard_normal((2, 32, 32)).astype(np.float32)
    return image, [
        {"boxes": boxes},
        {"boxes": boxes, "multimask": True},
        {"point_coords": points, "point_labels": labels},
        {"boxes": boxes, "point_coords": points, "point_labels": labels, "multimask": True},
        {"boxes": boxes, "mask_input": mask_input},
    ]


def assert_same_prompts(answer, expected):
    np.testing.assert_array_equal(answer.masks, expected.masks)
    np.testing.assert_array_equal(answer.ious, expected.ious)
    np.testing.assert_array_equal(answer.logits, expected.logits)


@pytest.mark.triton
@pytest.mark.parametrize("size", [(80, 120), (1, 50)], ids=str)
@pytest.mark.parametrize(("protocol", "shared"), WAYS)
def test_prompts_equal_local_prediction(triton, predictor, protocol, shared, size):
    image, cases = prompt_cases(size)
    predictor.set_image(image)
    with DbsamClient(
        url_of(triton, protocol), protocol, shared_memory=shared, key=triton.key
    ) as client:
        for case in cases:
            expected = predictor.predict_prompts(**case)
            assert_same_prompts(client.segment_prompts(image, **case), expected)


@pytest.mark.triton
@pytest.mark.parametrize(("protocol", "shared"), WAYS)
def test_prompts_by_asyncio_equal_local_prediction(triton, predictor, protocol, shared):
    image, cases = prompt_cases((60, 70))
    predictor.set_image(image)

    async def ask():
        url = url_of(triton, protocol)
        async with AsyncDbsamClient(url, protocol, shared_memory=shared, key=triton.key) as client:
            return await asyncio.gather(*(client.segment_prompts(image, **c) for c in cases))

    for case, answer in zip(cases, asyncio.run(ask()), strict=True):
        assert_same_prompts(answer, predictor.predict_prompts(**case))


@pytest.mark.triton
def test_an_answer_refines_the_next_one(triton, predictor):
    image, boxes = random_case(90, 90, 1)
    predictor.set_image(image)
    first = predictor.predict_prompts(boxes=boxes, multimask=True)
    expected = predictor.predict_prompts(boxes=boxes, mask_input=first.logits[:, 2])
    with DbsamClient(triton.grpc_url) as client:
        answer = client.segment_prompts(image, boxes=boxes, multimask=True)
        refined = client.segment_prompts(image, boxes=boxes, mask_input=answer.logits[:, 2])
    assert_same_prompts(refined, expected)
    assert not np.array_equal(refined.logits, first.logits[:, :1])


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_prompt_ensemble_refuses_bad_requests_and_lives_on(triton, protocol):
    """Sent as raw arrays, past the client's own checks."""
    library = client_requests.load_library(f"tritonclient.{protocol}")
    image, boxes = random_case(40, 50, 2)
    good = client_requests.prompt_call(
        image, 32, boxes=boxes, point_coords=None, point_labels=None, mask_input=None
    )
    changes = [
        ({"point_labels": np.array([[2, 3], [1, -1]], np.int32)}, "must all end"),
        ({"point_coords": good.arrays["point_coords"] + 100}, "reaches outside"),
        ({"point_labels": np.full((3, 2), -1, np.int32)}, "one label a point"),
        ({"mask_input": np.full((2, 32, 32), np.nan, np.float32)}, "NaN or infinity"),
        ({"mask_input": np.zeros((1, 32, 32), np.float32)}, "expected float logits"),
        ({"mask_input": np.zeros((2, 31, 32), np.float32)}, "unexpected shape"),
        ({"has_mask_input": np.array([0.5, 1], np.float32)}, "expected 0 or 1"),
        ({"has_mask_input": np.ones(3, np.float32)}, "expected 0 or 1"),
        ({"point_labels": np.zeros((2, 2), np.int64)}, "expects 'INT32'"),
    ]
    url = url_of(triton, protocol)
    server = library.InferenceServerClient(url)
    try:
        for change, message in changes:
            call = client_requests.Call(good.spec, {**good.arrays, **change}, good.shapes)
            inputs, outputs = client_requests.tensors(library, call, None)
            with (
                pytest.raises(InputError, match=message),
                translated(ServerRequest(url, protocol, 60)),
            ):
                server.infer(good.spec.name, inputs, outputs=outputs)
    finally:
        server.close()
    with DbsamClient(url, protocol) as client:
        assert client.segment_prompts(image, boxes=boxes).masks.shape == (2, 1, 40, 50)


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_shared_memory_is_kept_between_requests_and_given_back(triton, protocol):
    before, already = regions(), set(registered(triton))
    with DbsamClient(
        url_of(triton, protocol), protocol, shared_memory=True, key=triton.key
    ) as client:
        client.segment(*random_case(50, 60))
        (first,) = regions() - before
        client.segment(*random_case(61, 40))
        assert regions() - before == {first}
        client.segment(*random_case(900, 700))
        (second,) = regions() - before
        assert second != first, "a larger image replaces the region"
        with pytest.raises(InputError):
            client.segment(random_case(50, 60)[0], np.full((1, 4), 7, np.float32), check=False)
        assert regions() == before, "after an error nothing is left"
        client.segment(*random_case(50, 60))
    assert regions() == before
    assert set(registered(triton)) <= already


def registered(triton) -> dict:
    """What the server still maps."""
    library = client_requests.load_library("tritonclient.grpc")
    server = library.InferenceServerClient(triton.grpc_url)
    try:
        key = {"triton-grpc-protocol-dbsam-key": triton.key}
        status = server.get_system_shared_memory_status(headers=key, as_json=True)
        return status.get("regions", {})
    finally:
        server.close()


@pytest.mark.triton
@pytest.mark.parametrize(("protocol", "shared"), WAYS)
def test_a_timeout_is_an_error_and_the_server_lives_on(triton, protocol, shared):
    image, boxes = np.zeros((3000, 3000, 3), np.uint8), np.array([[0, 0, 9, 9]], np.float32)
    image[0, 0] = 1
    url = url_of(triton, protocol)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the region is let go a little later
        with (
            pytest.raises(ServingError, match="did not answer in time"),
            DbsamClient(
                url, protocol, shared_memory=shared, key=triton.key, timeout_s=0.03
            ) as client,
        ):
            client.segment(image, boxes)
    with DbsamClient(url, protocol, shared_memory=shared, key=triton.key) as client:
        assert client.segment(image[:50, :50], boxes).masks.shape == (1, 1, 50, 50)


@pytest.mark.triton
def test_a_cancelled_task_leaves_no_shared_memory(triton):
    image, boxes = np.zeros((1500, 1500, 3), np.uint8), np.array([[0, 0, 9, 9]], np.float32)
    image[0, 0] = 1
    before, already = regions(), set(registered(triton))

    async def ask():
        async with AsyncDbsamClient(triton.grpc_url, shared_memory=True, key=triton.key) as client:
            task = asyncio.create_task(client.segment(image, boxes))
            while regions() == before:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert regions() == before
            return await client.segment(image[:50, :50], boxes)

    assert asyncio.run(ask()).masks.shape == (1, 1, 50, 50)
    assert set(registered(triton)) <= already


@pytest.mark.triton
def test_an_unknown_model_is_a_serving_error(triton, monkeypatch):
    image, boxes = random_case(20, 20)
    spec = client_requests.ensemble_spec(1)
    other = type(spec)("no_such_model", spec.inputs, spec.outputs)
    monkeypatch.setattr(client_requests, "ensemble_spec", lambda side: other)
    for protocol in ("grpc", "http"):
        with (
            DbsamClient(url_of(triton, protocol), protocol) as client,
            pytest.raises(ServingError, match="no_such_model"),
        ):
            client.segment(image, boxes)


@pytest.mark.triton
def test_an_answer_of_another_shape_is_refused(triton, monkeypatch):
    image, boxes = random_case(20, 20)
    honest = client_requests.box_call

    def expects_other_shapes(*args, **options):
        call = honest(*args, **options)
        return client_requests.Call(call.spec, call.arrays, {**call.shapes, "masks": (9, 20, 20)})

    monkeypatch.setattr(exchange, "box_call", expects_other_shapes)
    for shared in (False, True):
        with (
            DbsamClient(triton.grpc_url, shared_memory=shared, key=triton.key) as client,
            pytest.raises(ServingError, match="masks as UINT8"),
        ):
            client.segment(image, boxes)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("more", "scheme"),
    [
        (["--url"], ""),
        (["--shared-memory", "--url"], "triton://"),
        (["--transport", "http", "--url"], ""),
        (["--url"], "triton+http://"),
    ],
)
def test_the_command_writes_mask_and_overlay(triton, predictor, tmp_path, capsys, more, scheme):
    image, _ = random_case(48, 56)
    Image.fromarray(image).save(tmp_path / "a.png")
    boxes = np.array([[3, 4, 20, 30], [25, 5, 55, 40]], np.float32)
    predictor.set_image(image)
    expected = np.zeros((48, 56), np.uint8)
    for label, mask in enumerate(predictor.predict_boxes(boxes).masks[:, 0], start=1):
        expected[mask == 1] = label
    url = scheme + url_of(triton, "http" if "http" in [*more, scheme[7:-3]] else "grpc")
    (tmp_path / "server.key").write_text(f"{triton.key}\n")
    options = [str(tmp_path / "a.png"), *more, url, "--output", str(tmp_path / "out")]
    options += ["--key-file", str(tmp_path / "server.key")]
    for box in boxes:
        options += ["--box", *map(str, box)]
    assert run(client_door.main, options) == 0
    assert "1 slice in" in capsys.readouterr().out
    found = np.asarray(Image.open(tmp_path / "out" / "a_mask.png"))
    np.testing.assert_array_equal(found, expected)
    assert (tmp_path / "out" / "a_overlay.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--url", "https://localhost:8000"], "expected host:port, or triton, triton+http"),
        (["--url", "triton+http://localhost", "--transport", "grpc"], "drop --transport grpc"),
        (["--url", "triton://localhost", "--transport", "http"], "drop --transport http"),
    ],
)
def test_an_address_that_is_none_of_a_server(tmp_path, capsys, words, message):
    Image.fromarray(random_case(8, 8)[0]).save(tmp_path / "a.png")
    assert run(client_door.main, [str(tmp_path / "a.png"), "--box", *"1234", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.triton
@pytest.mark.parametrize(
    "prompts",
    [
        ["--point", "20", "15", "1", "--point", "2", "2", "0", "--multimask"],
        ["--box3d", "3", "4", "1", "40", "30", "3"],
        ["--slice", "2", "--box", "3", "4", "40", "30", "--point", "20", "15", "1"],
    ],
    ids=lambda words: " ".join(word for word in words if word.startswith("--")),
)
def test_the_command_takes_what_predict_takes(triton, tiny_artefact, tmp_path, prompts):
    volume = np.random.default_rng().integers(0, 256, (4, 40, 50), dtype=np.uint8)
    pixels = volume[:1] if "--multimask" in prompts else volume
    np.savez(tmp_path / "a.npz", imgs=np.repeat(pixels[..., None], 3, -1), spacing=[1, 1, 1])
    words = [str(tmp_path / "a.npz"), *prompts, "--format", "npz"]
    local = ["--artefact", str(tiny_artefact.folder), "--output", str(tmp_path / "local")]
    assert run(predict_door.main, [*words, *local]) == 0
    served = ["--url", triton.grpc_url, "--output", str(tmp_path / "served")]
    assert run(client_door.main, [*words, *served]) == 0
    with (
        np.load(tmp_path / "local" / "a_mask.npz") as expected,
        np.load(tmp_path / "served" / "a_mask.npz") as found,
    ):
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_other_protocols_port_is_named(triton, protocol):
    other = {"grpc": triton.http_url, "http": triton.grpc_url}[protocol]
    with (
        DbsamClient(other, protocol, timeout_s=10) as client,
        pytest.raises(NoServerError, match=r"its (HTTP|gRPC) port"),
    ):
        client.segment(*random_case(20, 20))
