"""A thousand wrong requests of 80 kinds, to every model over both protocols; run with `--slow`."""

from __future__ import annotations

from collections import Counter

import grpc
import numpy as np
import pytest
from support.serving import processes_of
from support.triton_calls import ask
from support.triton_fuzz import MODELS, kinds, send_grpc, send_http
from tritonclient.grpc import service_pb2_grpc

from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession

BOX = np.array([[2, 3, 30, 25]], np.float32)
_ROUNDS = 2


@pytest.mark.triton
@pytest.mark.slow
def test_wrong_requests_end_no_process_and_spoil_no_answer(triton, tiny_artefact):
    rng = np.random.default_rng(14)
    image = rng.integers(0, 256, (40, 33, 3), dtype=np.uint8)
    predictor = Predictor(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)
    predictor.set_image(image)
    expected = predictor.predict_boxes(BOX).masks
    stubs = sorted(processes_of(triton.pid))
    seen: Counter[tuple[str, str]] = Counter()
    names = set()
    side = tiny_artefact.preprocessing.image_size
    with grpc.insecure_channel(triton.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(_ROUNDS):
            for model in MODELS:
                for kind, message in kinds(model, rng, side):
                    statuses = send_grpc(stub, message), send_http(triton.http_url, message, rng)
                    for protocol, status in zip(("grpc", "http"), statuses, strict=True):
                        seen[protocol, status] += 1
                        names.add((kind, protocol))
                    assert sorted(processes_of(triton.pid)) == stubs, (model, kind, statuses)
                answer = ask(triton.grpc_url, {"raw_image": image, "boxes": BOX}, ("masks",))
                np.testing.assert_array_equal(answer["masks"], expected)
    print(f"\n{seen.total()} requests of {len(names)} kinds: {dict(sorted(seen.items()))}")
    assert seen.total() >= 1000
    assert len(names) >= 80
    assert seen["grpc", "UNAVAILABLE"] == seen["grpc", "DEADLINE_EXCEEDED"] == 0
