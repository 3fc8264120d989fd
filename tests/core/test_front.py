"""The front model with Triton's Python module played by a few names."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from support.metric_family import Family

from dbsam_deploy.core import front
from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.core.image_id import image_id
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.core.points import NATIVE
from dbsam_deploy.core.settings import (
    FrontSettings,
    preprocessing_from_config,
    settings_from_config,
)

HOW = Preprocessing(128)
IMAGE = np.arange(40 * 50 * 3, dtype=np.uint32).reshape(40, 50, 3).astype(np.uint8)
BOXES = np.array([[1, 2, 30, 35]], np.float32)


def tensor(name, array):
    return SimpleNamespace(
        name=lambda: name, as_numpy=lambda: array, array=array, is_cpu=lambda: True
    )


class TritonError:
    INVALID_ARG, INTERNAL, UNAVAILABLE, NOT_FOUND, CANCELLED = (
        "INVALID_ARG",
        "INTERNAL",
        "UNAVAILABLE",
        "NOT_FOUND",
        "CANCELLED",
    )

    def __init__(self, text, code):
        self.text, self.code = text, code

    def message(self):
        return self.text


class TritonModelException(Exception):  # noqa: N818 - Triton's name
    pass


def response(tensors=(), error=None):
    return SimpleNamespace(tensors={item.name(): item.array for item in tensors}, error=error)


def triton(call):
    """Triton's module; `call(model, feed)` answers BLS requests: arrays by name, or an error."""

    def inference_request(model_name, requested_output_names, inputs, **_):
        def run():
            found = call(model_name, {item.name(): item.array for item in inputs})
            if isinstance(found, str):
                error = TritonError(found, "")
                return SimpleNamespace(has_error=lambda: True, error=lambda: error)
            tensors = [tensor(name, found[name]) for name in requested_output_names]
            return SimpleNamespace(has_error=lambda: False, output_tensors=lambda: tensors)

        return SimpleNamespace(exec=run)

    logged = []
    return SimpleNamespace(
        InferenceRequest=inference_request,
        InferenceResponse=response,
        Tensor=tensor,
        TritonError=TritonError,
        TritonModelException=TritonModelException,
        MetricFamily=Family,
        PreferredMemory=lambda kind, device: kind,
        TRITONSERVER_MEMORY_CPU="cpu",
        TRITONSERVER_RESPONSE_COMPLETE_FINAL="final",
        Logger=SimpleNamespace(
            log_info=logged.append, log_error=logged.append, log_warn=logged.append
        ),
        logged=logged,
    )


class Request:
    """One request and the answer it gets."""

    def __init__(self, wanted=("masks",), *, timeout_us=0, cancelled=False, name="r1", **arrays):
        self.answered, self.wanted, self.timeout_us = threading.Event(), wanted, timeout_us
        self.cancelled, self.name, self.arrays = cancelled, name, arrays
        self.answer = None

    def inputs(self):
        return [tensor(*item) for item in self.arrays.items()]

    def get_response_sender(self):
        return self

    def send(self, answer, flags):
        assert self.answer is None, "one answer"
        assert flags == "final"
        self.answer = answer
        self.answered.set()

    def timeout(self):
        return self.timeout_us

    def is_cancelled(self):
        return self.cancelled

    def request_id(self):
        return self.name

    def requested_output_names(self):
        return set(self.wanted)

    def result(self):
        assert self.answered.wait(10)
        return self.answer


def config(**values):
    rules = {f"points_{kind}": how for kind, how in asdict(NATIVE).items()}
    items = {**asdict(HOW), **rules, **values}
    told = {k: {"string_value": str(v)} for k, v in items.items() if v is not None}
    return json.dumps({"parameters": told})


def graphs(model, feed):
    if model == "dbsam_encoder":
        return {"image_embeddings": np.zeros((1, 256, 8, 8), np.float32)}
    count = feed["boxes"].shape[1]
    low = np.ones((1, count, 1, 32, 32), np.float32)
    return {"low_res_masks": low, "iou_predictions": low[..., 0, 0]}


@pytest.fixture
def start(monkeypatch):
    """`start(call=graphs, **parameters)`: a front model that was initialised."""
    monkeypatch.setattr(front, "reuse_blocks", lambda nbytes: None)  # of the tests' whole process
    Family.values.clear()
    models = []

    def make(call=graphs, **values):
        model = front.TritonFront()
        model.triton = triton(call)
        model.initialize({"model_name": "m", "model_config": config(**values)})
        models.append(model)
        return model

    yield make
    for model in models:
        model.finalize()


def ask(model, **given):
    request = Request(**given)
    assert model.execute([request]) is None
    return request.result()


def test_an_answer_comes_later_and_is_counted(start):
    model = start()
    first = ask(model, raw_image=IMAGE, boxes=BOXES, wanted=("masks", "cached"))
    assert first.error is None
    assert first.tensors["masks"].shape == (1, 1, 40, 50)
    again = ask(model, image_id=np.array([image_id(IMAGE).encode()], object), boxes=BOXES)
    assert again.error is None
    model.finalize()
    values = Family.values
    assert values["dbsam_requests_total"] == 2
    assert values["dbsam_requests_in_flight"] == 0
    assert (values["dbsam_cache_hits_total"], values["dbsam_cache_misses_total"]) == (1, 1)
    assert values["dbsam_cache_bytes"] == 256 * 8 * 8 * 4
    assert values["dbsam_cache_images"] == 1


def test_one_bad_request_does_not_spoil_the_others(start):
    model = start()
    requests = [
        Request(raw_image=IMAGE, boxes=BOXES),
        Request(raw_image=IMAGE, boxes=BOXES * 9, name="bad\nid"),
        Request(raw_image=IMAGE, boxes=BOXES),
    ]
    model.execute(requests)
    first, second, third = (request.result() for request in requests)
    assert first.error is None
    assert third.error is None
    assert second.error.code == "INVALID_ARG"
    assert "reaches outside" in second.error.text
    assert second.error.text.endswith("[request bad?id]")


def test_an_embedding_on_a_gpu_stays_there(start):
    on_gpu = tensor("image_embeddings", None)
    on_gpu.is_cpu = lambda: False
    on_gpu.as_numpy = lambda: pytest.fail("copied to the host")
    seen = []

    def call(model, feed):
        return {"image_embeddings": None} if model == "dbsam_encoder" else graphs(model, feed)

    model = start(call)
    make, pb = model.triton.InferenceRequest, model.triton

    def request(model_name, requested_output_names, inputs, **options):
        found = make(model_name, requested_output_names, inputs, **options)
        if model_name == "dbsam_encoder":
            encoded = SimpleNamespace(has_error=lambda: False, output_tensors=lambda: [on_gpu])
            return SimpleNamespace(exec=lambda: encoded)
        seen.append((inputs[0], options["preferred_memory"]))
        return found

    pb.InferenceRequest = request
    assert ask(model, raw_image=IMAGE, boxes=BOXES).error is None
    known = np.array([image_id(IMAGE).encode()], object)
    assert ask(model, image_id=known, boxes=BOXES).error is None
    assert [(given is on_gpu, where) for given, where in seen] == [(True, "cpu")] * 2


@pytest.mark.parametrize(
    ("found", "code", "text"),
    [
        ("overflow", "INTERNAL", "dbsam_encoder failed: overflow"),
        ("Stub process 'dbsam_encoder_0_0' is not healthy.", "UNAVAILABLE", "being restarted"),
        ("Request for unknown model: 'dbsam_encoder' has no available versions", "UNAVAILABLE", ""),
    ],
)
def test_an_error_of_a_graph(start, found, code, text):
    answer = ask(start(lambda *_: found), raw_image=IMAGE, boxes=BOXES)
    assert answer.error.code == code
    assert text in answer.error.text


def test_a_bug_is_an_answer_and_a_traceback_in_the_log(start):
    def broken(*_):
        raise ZeroDivisionError("of ours")

    model = start(broken)
    for _ in range(5):  # more than there are threads
        answer = ask(model, raw_image=IMAGE, boxes=BOXES)
        assert (answer.error.code, answer.error.text[:17]) == ("INTERNAL", "ZeroDivisionError")
    assert "Traceback" in model.triton.logged[0]


class Held:
    """Graphs that answer when they are let go."""

    def __init__(self):
        self.go, self.begun = threading.Event(), threading.Semaphore(0)

    def __call__(self, model, feed):
        self.begun.release()
        assert self.go.wait(10)
        return graphs(model, feed)


def test_what_does_not_fit_is_shed_at_once(start):
    held = Held()
    model = start(held, max_waiting=1, image_workers=1)
    running, waiting, shed = (Request(raw_image=IMAGE, boxes=BOXES) for _ in range(3))
    model.execute([running])
    assert held.begun.acquire(timeout=10)
    model.execute([waiting, shed])
    assert shed.result().error.code == "UNAVAILABLE"
    assert "busy: 1 requests wait, at most 1" in shed.result().error.text
    assert Family.values["dbsam_requests_shed_total"] == 1
    assert Family.values["dbsam_requests_in_flight"] == 2
    held.go.set()
    assert running.result().error is None
    assert waiting.result().error is None


def test_a_full_shared_memory_is_an_answer_and_costs_no_worker(start, monkeypatch):
    """Answers, log lines and metrics all go through it."""

    class Full(Request):
        def send(self, answer, flags):
            if answer.error is None:
                raise RuntimeError("Failed to increase the shared memory pool size")
            super().send(answer, flags)

    def full(*_):
        raise RuntimeError("Failed to increase the shared memory pool size")

    model = start(prompt_workers=1, image_workers=1)
    for name in ("log_info", "log_warn", "log_error"):
        monkeypatch.setattr(model.triton.Logger, name, full)
    monkeypatch.setattr(Family, "increment", full)
    for _ in range(3):  # more than there are workers
        request = Full(raw_image=IMAGE, boxes=BOXES)
        model.execute([request])
        assert request.result().error.code == "UNAVAILABLE"
        assert "is /dev/shm full?" in request.result().error.text
    assert ask(model, raw_image=IMAGE, boxes=BOXES * 9).error.code == "INVALID_ARG"


def test_late_and_abandoned_requests_do_no_work(start):
    model = start(lambda *_: pytest.fail("work was done"))
    gone = ask(model, raw_image=IMAGE, boxes=BOXES, cancelled=True)
    assert (gone.error.code, "has gone" in gone.error.text) == ("CANCELLED", True)
    late = ask(model, raw_image=IMAGE, boxes=BOXES, timeout_us=1)
    assert (late.error.code, "late" in late.error.text) == ("CANCELLED", True)
    model.finalize()
    assert Family.values["dbsam_requests_cancelled_total"] == 1
    assert Family.values["dbsam_requests_late_total"] == 1


def test_what_waited_too_long_is_dropped_though_its_client_waits_for_ever(start):
    held = Held()
    model = start(held, image_workers=1, max_wait_ms=300)
    running, waiting = (Request(raw_image=IMAGE, boxes=BOXES) for _ in range(2))
    model.execute([running])
    assert held.begun.acquire(timeout=10)
    model.execute([waiting])
    time.sleep(0.4)
    held.go.set()
    assert running.result().error is None, "it did not wait, it was only slow"
    assert (waiting.result().error.code, waiting.result().error.text[:5]) == ("CANCELLED", "late:")


def test_a_server_that_stops_takes_nothing_new(start, tmp_path, monkeypatch):
    monkeypatch.setenv(front.CONTROL_VARIABLE, str(tmp_path))
    model = start()
    assert ask(model, raw_image=IMAGE, boxes=BOXES).error is None
    (tmp_path / front.DRAINING).touch()
    answer = ask(model, raw_image=IMAGE, boxes=BOXES)
    assert answer.error.code == "UNAVAILABLE"
    assert answer.error.text.startswith("stopping: ")


def test_settings_come_from_the_configuration():
    how = Preprocessing(256, "lite_medsam", embedding_stride=4)
    assert preprocessing_from_config(config(**asdict(how))) == how
    framed = Preprocessing(512, frame_size=1024)
    assert preprocessing_from_config(config(**asdict(framed))) == framed
    with pytest.raises(InputError, match="export again"):
        preprocessing_from_config("{}")
    finer = Preprocessing(512, "sam2", high_res=True)
    assert preprocessing_from_config(config(**asdict(finer))) == finer
    assert settings_from_config("{}") == FrontSettings()
    assert settings_from_config(config(chunk=3, cache_mib=0)) == FrontSettings(chunk=3, cache_mib=0)
    for wrong in ({"chunk": 0}, {"chunk": -1}, {"max_waiting": "many"}, {"cache_mib": 2**31}):
        with pytest.raises(InputError, match=f"parameter {next(iter(wrong))} is"):
            settings_from_config(config(**wrong))


def test_a_missing_library_or_a_wrong_setting_shows_when_the_model_loads(start, monkeypatch):
    with pytest.raises(TritonModelException, match=r"m: .*parameter chunk"):
        start(chunk="x")

    def missing(*_):
        raise EngineError("needs scikit-image")

    monkeypatch.setattr(front, "preprocess", missing)
    with pytest.raises(TritonModelException, match="m: needs scikit-image"):
        start()
