"""Image and boxes → masks through the ensemble of the real Triton server, over gRPC."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dbsam_deploy import benchmarking
from dbsam_deploy.client import DbsamClient
from dbsam_deploy.predictor import Predictor
from dbsam_deploy.repository import build_repository
from dbsam_deploy.triton_server import Ports, TritonServer

ONE_THREAD = 'parameters { key: "intra_op_thread_count" value { string_value: "1" } }\n'
OVERHEAD_ROUNDS = 15


@pytest.fixture(scope="module")
def client(subject, server_environment, server_log: Path) -> Iterator[DbsamClient]:
    repository = build_repository(subject.artefact, server_log.parent / "model_repository")
    for model in ("dbsam_encoder", "dbsam_decoder"):
        with (repository.folder / model / "config.pbtxt").open("a") as stream:
            stream.write(ONE_THREAD)
    ports = Ports(0, 0, 0)
    with (
        TritonServer(repository.folder, server_environment, log=server_log, ports=ports) as server,
        DbsamClient(server.grpc_url) as client,
    ):
        yield client


@pytest.mark.triton
def test_ensemble(benchmark_ratio, subject, case, check_masks, client: DbsamClient) -> None:
    predictor = Predictor(subject.onnxruntime, subject.artefact.preprocessing)

    def predict():
        predictor.set_image(case.image)
        return predictor.predict_boxes(case.boxes).masks[:, 0]

    def ensemble():
        return client.segment(case.image, case.boxes).masks

    def check(masks) -> dict[str, str | float]:
        facts = check_masks(masks)
        np.testing.assert_array_equal(masks, predict())
        beside = benchmarking.measure(ensemble, predict, rounds=OVERHEAD_ROUNDS)
        return {**facts, "overhead_ms": beside.median_ms - beside.reference_ms}

    benchmark_ratio(ensemble, check)
