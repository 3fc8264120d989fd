"""Image and boxes → masks through the ensemble of the real Triton server, over gRPC.

The reference workload is served by the same server: on a busy machine the processes of a server get
another share of time than a process that computes all along.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from timing import ratios as benchmarking

from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.core.contract import interactive_spec
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.serving.ports import Ports
from dbsam_deploy.serving.repository import build_repository, file_hashes, write_repository
from dbsam_deploy.serving.server import TritonServer

ONE_THREAD = 'parameters { key: "intra_op_thread_count" value { string_value: "1" } }\n'
REFERENCE_CONFIG = """\
name: "reference"
backend: "onnxruntime"
max_batch_size: 0
input [ { name: "x" data_type: TYPE_FP32 dims: [ 1, 64, 48, 48 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 576, 256 ] } ]
"""
OVERHEAD_ROUNDS = 15


@pytest.fixture(scope="module")
def server(subject, server_environment, tmp_path_factory) -> Iterator[TritonServer]:
    folder: Path = tmp_path_factory.mktemp("benchmark_server")
    repository = build_repository(subject.artefact, folder / "model_repository")
    models = repository.folder
    (models / "reference" / "1").mkdir(parents=True)
    (models / "reference" / "1" / "model.onnx").write_bytes(benchmarking.reference_graph())
    (models / "reference" / "config.pbtxt").write_text(REFERENCE_CONFIG)
    for model in ("dbsam_encoder", "dbsam_decoder", "reference"):
        with (models / model / "config.pbtxt").open("a") as stream:
            stream.write(ONE_THREAD)
    config = models / interactive_spec(1).name / "config.pbtxt"
    kept = re.compile(r'(key: "cache_mib" value \{ string_value: ")\d+')
    text, count = kept.subn(r"\g<1>0", config.read_text())
    assert count == 1  # the image comes again and again, and has to be encoded each time
    config.write_text(text)
    write_repository(replace(repository, files=file_hashes(models)))  # with the reference
    log, ports = folder / "server.log", Ports(0, 0, 0)
    with TritonServer(
        models, server_environment, log=log, ports=ports, expose_stages=True
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[DbsamClient]:
    with DbsamClient(server.grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def served_reference(server: TritonServer) -> Iterator[benchmarking.Workload]:
    from tritonclient import grpc

    (x,) = benchmarking.reference_feed().values()
    feed = grpc.InferInput("x", x.shape, "FP32")
    feed.set_data_from_numpy(x)
    with grpc.InferenceServerClient(server.grpc_url) as connection:

        def run() -> list[np.ndarray]:
            return [connection.infer("reference", [feed]).as_numpy("y")]

        yield run


@pytest.mark.triton
def test_ensemble(
    benchmark_ratio, subject, case, check_masks, client, reference_workload, served_reference
) -> None:
    predictor = Predictor(subject.onnxruntime, subject.artefact.preprocessing)

    def predict() -> np.ndarray:
        predictor.forget_images()  # the server encodes at each call, too
        predictor.set_image(case.image)
        return predictor.predict_boxes(case.boxes).masks[:, 0]

    def ensemble() -> np.ndarray:
        return client.segment(case.image, case.boxes).masks[:, 0]

    def check(masks: np.ndarray) -> dict[str, str | float]:
        np.testing.assert_array_equal(served_reference()[0], reference_workload()[0])
        np.testing.assert_array_equal(masks, predict())
        beside = benchmarking.measure(ensemble, predict, rounds=OVERHEAD_ROUNDS)
        return {**check_masks(masks), "overhead_ms": beside.median_ms - beside.reference_ms}

    benchmark_ratio(ensemble, check, reference=served_reference)
