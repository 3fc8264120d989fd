"""The real tritonserver: starts, proves it answers, survives bad requests, leaves nothing."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import re
import shutil
import signal
import socket
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from support.manifests import reseal
from support.served_points import check_points
from support.serving import processes_of, wait_until

from dbsam_deploy.artefact import graph_file
from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.core.contract import MAX_IMAGE_PIXELS
from dbsam_deploy.core.errors import InputError, ServingError
from dbsam_deploy.model.weights import load_model
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.recipe import load_recipe
from dbsam_deploy.serving.environment import ServerEnvironment, find_environment
from dbsam_deploy.serving.ports import Ports
from dbsam_deploy.serving.repository import REPOSITORY_NAME, build_repository, file_hashes
from dbsam_deploy.serving.server import TritonServer
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.sessions.pytorch_session import PytorchSession
from dbsam_deploy.verification.cases import bundled_examples, load_cases
from dbsam_deploy.verification.parity import dice

ROOT = Path(__file__).resolve().parents[2]
FREE = Ports(0, 0, 0)
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
BOX = np.array([[2, 3, 30, 25]], np.float32)


def random_image(*size: int) -> np.ndarray:
    return np.random.default_rng().integers(0, 256, (*size, 3), dtype=np.uint8)


def local_masks(artefact, image, boxes):
    predictor = Predictor(OnnxRuntimeSession(artefact), artefact.preprocessing)
    predictor.set_image(image)
    return predictor.predict_boxes(boxes).masks


def assert_none_left(group: int) -> None:
    """A killed process needs a moment to go."""
    deadline = time.monotonic() + 5
    while processes_of(group) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_of(group) == []


def assert_answers_like_local(server, artefact):
    image = random_image(40, 33)
    with DbsamClient(server.grpc_url) as client:
        masks = client.segment(image, BOX).masks
    np.testing.assert_array_equal(masks, local_masks(artefact, image, BOX))


@pytest.mark.triton
def test_the_log_says_stand_in(triton):
    log = triton.log_text()
    for model in ("dbsam_encoder", "dbsam_decoder", "dbsam_prompt_decoder"):
        assert f"STAND-IN, model {model}: a stand-in for Triton's onnxruntime backend" in log


@pytest.mark.triton
def test_the_server_listens_on_the_loopback_only(triton):
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A":
                address, port = local.split(":")
                listening.add((address, int(port, 16)))
    ports = {triton.ports.http, triton.ports.grpc, triton.ports.metrics}
    ours = {item for item in listening if item[1] in ports}
    assert {item[1] for item in ours} == ports
    assert all(item[0].endswith("0100007F") for item in ours), "127.0.0.1, maybe mapped into IPv6"


@pytest.mark.triton
def test_metrics_count_requests(triton):
    def successes() -> float:
        with urllib.request.urlopen(f"http://{triton.metrics_url}/metrics", timeout=10) as page:
            text = page.read().decode()
        found = re.search(r'nv_inference_request_success\{model="dbsam",version="1"\} (\d+)', text)
        return float(found.group(1))

    before = successes()
    triton.check()
    # The server sends an ensemble's answer before it counts it.
    deadline = time.monotonic() + 10
    while successes() == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert successes() == before + 1


@pytest.mark.triton
def test_a_server_at_any_path_leaves_no_process_memory_or_file(
    tiny_repository, server_environment, tmp_path, monkeypatch
):
    """Blanks and letters of other languages in every path, which Triton's stubs do not survive."""
    place = tmp_path / "Büro Ärzte $HOME '; 影像"
    shutil.copytree(tiny_repository.folder, place / "mo del")
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    before = set(SHARED_MEMORY.iterdir())
    log = place / "lo g"
    server = TritonServer(place / "mo del", server_environment, log=log, ports=FREE)
    with server:
        group = server.pid
        assert len(processes_of(group)) > 3, "server and stubs"
        assert list(SHARED_MEMORY.glob(f"{server.shared_memory_prefix}*"))
        assert (runtime := server._runtime).is_dir()
        with pytest.raises(ServingError, match="started already"):
            server.start()
    assert_none_left(group)
    assert not list(SHARED_MEMORY.glob(f"{server.shared_memory_prefix}*"))
    assert not {p for p in set(SHARED_MEMORY.iterdir()) - before if "dbsam_client" in p.name}
    assert not runtime.exists()
    server.stop()
    with pytest.raises(ServingError, match="not running"):
        server.check()


@pytest.mark.triton
def test_configurations_survive_auto_completion_and_stopping_cleans_up_after_a_killed_server(
    tiny_repository, tiny_artefact, server_environment, tmp_path
):
    log = tmp_path / "log"
    folder = tiny_repository.folder
    server = TritonServer(folder, server_environment, log=log, ports=FREE, auto_complete=True)
    with server:
        assert_answers_like_local(server, tiny_artefact)
        url = f"http://{server.http_url}/v2/models/dbsam_encoder{server.ending}/config"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert b'"max_batch_size":1' in answer.read()
        group = server.pid
        os.kill(group, signal.SIGKILL)
        assert wait_until(lambda: server.has_ended)
        assert "ended by SIGKILL" in server.why_ended()
        server.stop()
        assert_none_left(group)
        assert not list(SHARED_MEMORY.glob(f"{server.shared_memory_prefix}*"))


@pytest.mark.triton
def test_the_tensorrt_stand_in_serves_the_graph_and_says_what_that_proves(
    make_artefact, server_environment, tmp_path
):
    artefact = make_artefact(tmp_path / "a", 64)
    graphs = {}
    for name in artefact.graphs:
        plan = artefact.folder / f"{name}.plan"
        plan.write_bytes(b"an engine of some GPU")
        graphs[name] = graph_file(plan, artefact.folder)
    root = tmp_path / "r"
    build_repository(dataclasses.replace(artefact, graphs=graphs), root)
    with TritonServer(root, server_environment, log=tmp_path / "log", ports=FREE) as server:
        assert_answers_like_local(server, artefact)
        log = server.log_text()
    assert "stand-in for Triton's tensorrt backend" in log
    assert "proves the wiring, never the engine: model.plan itself is NOT run" in log
    (root / "dbsam_encoder" / "1" / "model.onnx").unlink()
    reseal(root / REPOSITORY_NAME, files=file_hashes(root))
    server = TritonServer(root, server_environment, log=tmp_path / "log2", ports=FREE)
    with pytest.raises(ServingError, match=r"a CPU machine cannot run model\.plan"):
        server.start()


@pytest.mark.triton
@pytest.mark.parametrize(
    ("mode", "stride", "frame"), [("medsam", 16, None), ("lite_medsam", 4, None), ("sam", 16, 128)]
)
def test_other_modes_are_served_as_they_are_computed_locally(
    make_artefact, server_environment, tmp_path, mode, stride, frame
):
    environment = find_environment(server_environment.folder, medsam=mode == "medsam")
    artefact = make_artefact(tmp_path / "a", 64, mode, stride=stride, frame_size=frame)
    root = tmp_path / "r"
    build_repository(artefact, root)
    with TritonServer(root, environment, log=tmp_path / "log", ports=FREE) as server:
        assert_answers_like_local(server, artefact)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        ("dbsam_encoder/1/model.onnx", None, "not a graph", "dbsam_encoder"),
        ("dbsam_decoder/config.pbtxt", "32, 32", "16, 16", r"config\.pbtxt says"),
        ("dbsam_interactive/config.pbtxt", '"sam"', '"other"', "preprocessing mode 'other'"),
    ],
)
def test_a_model_that_cannot_load_ends_the_start_with_its_reason(
    tiny_artefact, server_environment, tmp_path, path, old, new, message
):
    root = tmp_path / "r"
    build_repository(tiny_artefact, root)
    file = root / path
    file.write_text(new if old is None else file.read_text().replace(old, new))
    reseal(root / REPOSITORY_NAME, files=file_hashes(root))
    server = TritonServer(root, server_environment, log=tmp_path / "log", ports=FREE)
    with pytest.raises(ServingError, match=message):
        server.start()
    assert not list(SHARED_MEMORY.glob(f"{server.shared_memory_prefix}*"))


@pytest.mark.triton
@pytest.mark.parametrize(
    ("words", "how", "starts"),
    [
        ("E1129 22:59:02.000 1 model.cc:64] failed to load model x: too small", "SEGV", 1),
        ("  what():  boost::interprocess::lock_exception", "ABRT", 3),
    ],
    ids=["while it gives up", "because its models are slow"],
)
def test_a_server_that_crashes_while_it_loads_names_its_reason(
    tiny_repository, server_environment, tmp_path, words, how, starts
):
    """It is started again only where a machine that is busy now may be the reason."""
    crashing = tmp_path / "bin" / "tritonserver"
    crashing.parent.mkdir()
    crashing.write_text(f"#!/bin/sh\necho '{words}'\nkill -{how} $$\n")
    crashing.chmod(0o755)
    environment = dataclasses.replace(server_environment, root=tmp_path)
    (tmp_path / "backends").symlink_to(server_environment.root / "backends")
    server = TritonServer(tiny_repository.folder, environment, log=tmp_path / "log", ports=FREE)
    with pytest.raises(ServingError, match=rf"ended by SIG{how}: .*{words[-12:]}"):
        server.start()
    assert (tmp_path / "log").read_text().count(words + "\n") == starts
    assert not list(SHARED_MEMORY.glob(f"{server.shared_memory_prefix}*"))


def test_a_taken_port_is_named_before_anything_starts(tmp_path):
    environment = ServerEnvironment(tmp_path, tmp_path, tmp_path / "stub", ())
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ports = Ports(0, other.getsockname()[1], 0)
        server = TritonServer(tmp_path, environment, log=tmp_path / "log", ports=ports)
        with pytest.raises(InputError, match=r"--grpc-port"):
            server.start()
    assert not (tmp_path / "log").exists()


WRONG = [
    (random_image(20, 20).astype(np.float32), BOX[:, [0, 1, 0, 1]], "expects 'UINT8'"),
    (random_image(40, 40), BOX.astype(np.float64), "expects 'FP32'"),
    (random_image(40, 40)[..., 0], BOX, "unexpected shape"),
    (random_image(40, 40)[..., :2], BOX, "unexpected shape"),
    (random_image(40, 40)[:0], BOX, "none of them 0"),
    (random_image(40, 40), BOX[0], "unexpected shape"),
    (random_image(40, 40), BOX[:, :3], "unexpected shape"),
    (random_image(40, 40), BOX[:0], "0 boxes"),
    (random_image(40, 40), np.repeat(BOX, 257, 0), "257 boxes"),
    (random_image(20, 20), BOX, "reaches outside the image"),
    (random_image(40, 40), -BOX[:, [2, 3, 0, 1]], "reaches outside the image"),
    (random_image(40, 40), BOX[:, [2, 3, 0, 1]], "x0 < x1"),
    (random_image(40, 40), BOX * np.float32(np.nan), "finite"),
    (random_image(40, 40), BOX * np.float32(np.inf), "finite"),
]


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize(
    ("image", "boxes", "message"), WRONG, ids=[f"{i}-{wrong[2]}" for i, wrong in enumerate(WRONG)]
)
def test_bad_requests_get_a_clear_error_and_the_server_lives_on(
    triton, tiny_artefact, protocol, image, boxes, message
):
    url = triton.grpc_url if protocol == "grpc" else triton.http_url
    good = random_image(31, 57)
    pid = triton.pid
    with DbsamClient(url, protocol) as client:
        with pytest.raises(InputError, match=message):
            client.segment(image, boxes, check=False)
        masks = client.segment(good, BOX).masks
    np.testing.assert_array_equal(masks, local_masks(tiny_artefact, good, BOX))
    assert triton.pid == pid


@pytest.mark.triton
def test_a_huge_image_is_refused_by_the_server_itself(triton):
    """192 MiB go through shared memory, so that no copy is made on the way."""
    side = 8192
    assert side * side == MAX_IMAGE_PIXELS
    image = np.zeros((side + 1, side, 3), np.uint8)
    with DbsamClient(triton.grpc_url, shared_memory=True, key=triton.key) as client:
        with pytest.raises(InputError, match=f"at most {MAX_IMAGE_PIXELS} pixels"):
            client.segment(image, BOX, check=False)
        assert client.segment(random_image(40, 40), BOX).masks.shape == (1, 1, 40, 40)


@pytest.mark.triton
def test_a_request_whose_masks_would_fill_memory_is_refused(triton):
    image = np.zeros((4096, 4096, 3), np.uint8)
    image[0, 0] = 1
    boxes = np.repeat(BOX, 65, 0)
    with DbsamClient(triton.grpc_url) as client:
        with pytest.raises(InputError, match="fewer prompts"):
            client.segment(image, boxes)
        with pytest.raises(InputError, match=r"refused the request.*fewer prompts"):
            client.segment(image, boxes, check=False)


@pytest.mark.triton
def test_concurrent_requests_each_get_their_own_masks(triton, tiny_artefact):
    rng = np.random.default_rng()
    cases = []
    for _ in range(24):
        image = random_image(*rng.integers(30, 90, 2))
        boxes = np.repeat(BOX, rng.integers(1, 4), 0) - rng.uniform(0, 2, (1, 4)).astype(np.float32)
        boxes[:, :2] = np.maximum(boxes[:, :2], 0)
        cases.append((image, boxes))

    def ask(case):
        with DbsamClient(triton.grpc_url) as client:
            return client.segment(*case).masks

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, cases))
    for (image, boxes), masks in zip(cases, answers, strict=True):
        np.testing.assert_array_equal(masks, local_masks(tiny_artefact, image, boxes))


@pytest.mark.triton
def test_the_exported_tiny_model_is_served_bit_for_bit(
    published_export, server_environment, tmp_path
):
    """The whole way: export, repository, server, and real images with their boxes."""
    options, published = published_export
    predictor = Predictor(OnnxRuntimeSession(published.artefact), published.artefact.preprocessing)
    root, log = published.repository.folder, tmp_path / "log"
    with (
        TritonServer(root, server_environment, log=log, ports=FREE) as server,
        DbsamClient(server.grpc_url, shared_memory=True, key=server.key) as client,
    ):
        for case in load_cases(bundled_examples(), load_recipe(options.precision).parity)[:4]:
            predictor.set_image(case.image)
            expected = predictor.predict_boxes(case.boxes)
            answer = client.segment(case.image, case.boxes)
            np.testing.assert_array_equal(answer.masks, expected.masks)
            np.testing.assert_array_equal(answer.ious, expected.ious)
            expected = predictor.predict_prompts(boxes=case.boxes, multimask=True)
            answer = client.segment_prompts(case.image, boxes=case.boxes, multimask=True)
            np.testing.assert_array_equal(answer.masks, expected.masks)
            np.testing.assert_array_equal(answer.logits, expected.logits)
        check_points(server, published.artefact, case)


@pytest.mark.triton
def test_int8_masks_of_the_ensemble_pass_the_gate_against_pytorch(
    published_int8, server_environment, tmp_path
):
    """The same contract as fp32: only the encoder's file differs, and masks agree."""
    _, published = published_int8
    root = published.repository.folder
    plain = dataclasses.replace(published.artefact, precision="fp32", quantization={})
    other = build_repository(plain, tmp_path / "fp32").folder
    for config in sorted(root.rglob("config.pbtxt")):
        theirs = (other / config.relative_to(root)).read_text()
        assert config.read_text().replace("int8", "fp32") == theirs
    how, recipe = published.artefact.preprocessing, load_recipe("int8")
    reference = Predictor(PytorchSession(load_model(image_size=how.image_size).model), how)
    agreement = []
    log = tmp_path / "log"
    with (
        TritonServer(root, server_environment, log=log, ports=FREE) as server,
        DbsamClient(server.grpc_url) as client,
    ):
        for case in load_cases(bundled_examples(), recipe.parity):
            reference.set_image(case.image)
            expected = reference.predict_boxes(case.boxes).masks
            masks = client.segment(case.image, case.boxes).masks
            agreement += [dice(*pair) for pair in zip(masks, expected, strict=True)]
            prompts = {"boxes": case.boxes, "multimask": True}
            expected = reference.predict_prompts(**prompts).masks
            masks = client.segment_prompts(case.image, **prompts).masks
            agreement += [dice(masks[i], expected[i]) for i in np.ndindex(*masks.shape[:2])]
    assert len(agreement) > 60
    assert np.mean(agreement) >= recipe.gate.mask_agreement_mean
    assert np.percentile(agreement, 5) >= recipe.gate.mask_agreement_p5
