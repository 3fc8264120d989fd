"""An export whose graphs resize images and make masks, through every way to run it.

The export is of small graphs (`make_tiny_artefact`), beside the same one whose images and masks are
made on the host; the graphs themselves are in tests/graphs/test_imaging_graphs.py.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from support.cuda import CpuGpu, stand_in_device
from support.engines import fake_runtime, put_engines

from dbsam_deploy.artefact import load_artefact
from dbsam_deploy.clients.client import DbsamClient
from dbsam_deploy.core.errors import InputError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.core.settings import preprocessing_from_config
from dbsam_deploy.engines.build import EngineOptions, build_engines, check_options
from dbsam_deploy.engines.kinds import TENSORRT, TENSORRT_RTX
from dbsam_deploy.prediction.predictor import Predictor, ServedPredictor
from dbsam_deploy.recipe import Gate, Parity
from dbsam_deploy.serving.probe import ask_stage
from dbsam_deploy.serving.repository import build_repository, load_repository
from dbsam_deploy.serving.server import Ports, TritonServer
from dbsam_deploy.serving.triton_config import GRAPH_MODELS, render_configs
from dbsam_deploy.sessions.backends import ModelOptions, open_backend
from dbsam_deploy.sessions.engine_session import TensorrtRtxSession, TensorrtSession
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.sessions.openvino_session import OpenvinoSession
from dbsam_deploy.verification.cases import bundled_examples, load_cases
from dbsam_deploy.verification.engine_parity import verify_engines

IMAGE = np.random.default_rng(3).integers(0, 256, (140, 93, 3), dtype=np.uint8)
BOXES = np.tile(np.array([[2, 3, 80, 75], [10, 12, 70, 139]], np.float32), (5, 1))
"""More than a graph makes masks of at once."""
POINTS = {
    "point_coords": np.array([[[5, 6], [70, 130]], [[80, 8], [31, 2]]], np.float32),
    "point_labels": np.array([[1, 0], [1, 1]], np.int32),
}


@pytest.fixture(scope="module")
def exports(make_artefact, tmp_path_factory):
    """The export with graphs, and the one without."""
    folder = tmp_path_factory.mktemp("in_graph")
    return [
        make_artefact(folder / name, pixels_in_graph=name == "graph") for name in ("graph", "host")
    ]


def answers(predictor):
    """Boxes, points with alternatives, boxes with points and an earlier mask."""
    boxes = predictor.predict_boxes(BOXES)
    yield boxes
    yield predictor.predict_prompts(multimask=True, **POINTS)
    earlier = boxes.known_logits()[:2, 0]
    yield predictor.predict_prompts(boxes=BOXES[:2], mask_input=earlier, **POINTS)


def answers_of(artefact, session):
    predictor = Predictor(session, artefact.preprocessing)
    predictor.set_image(IMAGE)
    return list(answers(predictor))


def check_same(found, wanted, atol=0.0):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=atol)
        np.testing.assert_array_equal(one.masks, other.masks)
        assert 0 < one.masks.mean() < 1


def test_masks_are_those_of_the_host(exports):
    graph, host = exports
    found, wanted = (answers_of(one, OnnxRuntimeSession(one)) for one in exports)
    check_same(found, wanted)
    assert set(graph.graphs) == {*host.graphs, "mask_bits"}
    for name in ("decoder", "prompt_decoder"):
        assert graph.graphs[name] == host.graphs[name]


def test_openvino_takes_pixels(exports, tmp_path):
    sessions = (OpenvinoSession(one, cache=tmp_path / "cache") for one in exports)
    check_same(*map(answers_of, exports, sessions), atol=1e-5)


def test_pixels_are_not_rounded_where_the_encoder_is(exports, tmp_path):
    found, wanted = (
        Predictor(
            OpenvinoSession(one, precision="bfloat16", cache=tmp_path / "cache"), one.preprocessing
        ).encode(IMAGE)
        for one in exports
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_engines_are_held_against_the_reference_from_the_image_on(exports, tmp_path):
    graph, host = (
        put_engines(load_artefact(shutil.copytree(one.folder, tmp_path / str(i))), TENSORRT)
        for i, one in enumerate(exports)
    )
    gpu = CpuGpu()
    options = {"device": stand_in_device(gpu), "runtime": fake_runtime(gpu, "11.4.0.106")}
    cases = load_cases(bundled_examples(), Parity(2, 3, 20, 16))
    gate, reference = Gate(1 - 1e-9, 1, 1, 0), OnnxRuntimeSession(host)
    records = verify_engines(graph, TENSORRT, reference, cases, gate, **options)
    assert set(records) == set(graph.graphs)
    session = TensorrtSession(graph, **options)
    check_engines(session, graph, host, atol=0)
    session.close()


def check_engines(session, graph, host, atol: float) -> None:
    """Masks of images of several sizes, and of one that is resized and masked on the host."""
    reference = OnnxRuntimeSession(host)
    for image in (IMAGE, IMAGE[:, ::-1], IMAGE[:139, :80], np.tile(IMAGE, (15, 1, 1)), IMAGE):
        one, other = (
            Predictor(opened, artefact.preprocessing)
            for opened, artefact in ((session, graph), (reference, host))
        )
        boxes = np.minimum(BOXES, [image.shape[1], image.shape[0]] * 2)
        for predictor in (one, other):
            predictor.set_image(np.ascontiguousarray(image))
        found, wanted = one.predict_boxes(boxes), other.predict_boxes(boxes)
        np.testing.assert_allclose(found.logits, wanted.logits, rtol=0, atol=atol)
        assert (found.masks != wanted.masks).mean() <= atol
        assert 0 < wanted.masks.mean() < 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "opened"),
    [
        pytest.param(TENSORRT, TensorrtSession, marks=pytest.mark.trt, id="tensorrt"),
        pytest.param(TENSORRT_RTX, TensorrtRtxSession, marks=pytest.mark.rtx, id="tensorrt-rtx"),
    ],
)
def test_engines_on_a_gpu_make_the_same_masks(exports, tmp_path, kind, opened):
    graph = load_artefact(shutil.copytree(exports[0].folder, tmp_path / "export"))
    build_engines(graph, check_options(EngineOptions(kind)))
    session = opened(graph, verified=False)
    check_engines(session, graph, exports[1], atol=1e-3)
    session.close()


@pytest.mark.rtx
def test_nvidias_builder_takes_the_graphs(exports, tmp_path):
    graph = load_artefact(shutil.copytree(exports[0].folder, tmp_path / "export"))
    request = check_options(EngineOptions(TENSORRT_RTX, ("sm_86",)))
    records = build_engines(graph, request)
    assert {"encoder", "mask_bits"} <= records.keys()
    assert records["encoder"].ranges["height"].most == 2048
    assert all(record.plan.size_bytes > 10_000 for record in records.values())


def test_a_front_answers_with_the_same_masks(exports, tmp_path):
    """Without a server: what its models have to answer is computed by the front's own code."""
    found, wanted = (
        build_repository(one, tmp_path / f"{i}/repository").known_answers
        for i, one in enumerate(exports)
    )
    assert found == wanted
    assert set(found) == {"dbsam", "dbsam_prompts"}


@pytest.mark.triton
def test_served_masks_are_the_local_ones(exports, server_environment, tmp_path):
    graph, _ = exports
    repository = build_repository(graph, tmp_path / "repository")
    assert load_repository(repository.folder) == repository
    wanted = answers_of(graph, OnnxRuntimeSession(graph))
    with (
        TritonServer(
            repository.folder, server_environment, log=tmp_path / "log", ports=Ports(0, 0, 0)
        ) as server,
        DbsamClient(server.grpc_url) as client,
    ):
        predictor = ServedPredictor(client)
        predictor.set_image(IMAGE)
        check_same(answers(predictor), wanted)
        for model in GRAPH_MODELS.values():  # as a watch asks whether they still answer
            ask_stage(server.http_url, model + server.ending, 30)


def test_a_manifest_and_a_configuration_say_so_and_no_others_do(exports):
    for artefact in exports:
        in_graph = artefact.preprocessing.pixels_in_graph
        body = json.loads((artefact.folder / "manifest.json").read_text())
        assert body["preprocessing"].get("pixels_in_graph", False) is in_graph
        configs = render_configs(artefact.preprocessing, dict.fromkeys(artefact.graphs, "tensorrt"))
        assert ("dbsam_mask_bits" in configs) is in_graph
        assert ("pixels" in "".join(configs.values())) is in_graph
        parameters = {
            name: {"string_value": str(value)} for name, value in body["preprocessing"].items()
        }
        told = json.dumps({"parameters": parameters})
        assert preprocessing_from_config(told) == artefact.preprocessing
    assert 'name: "pixels" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ]' in configs_of(exports[0])
    assert 'key: "row_taps"' in configs_of(exports[0]).partition("model_warmup")[2]


def configs_of(artefact) -> str:
    return render_configs(artefact.preprocessing, dict.fromkeys(artefact.graphs, "tensorrt"))[
        "dbsam_encoder"
    ]


def test_a_repository_without_the_masks_graph_is_refused(exports, tmp_path):
    graph, host = exports
    with pytest.raises(InputError, match="serving needs mask_bits; export again"):
        build_repository(replace(graph, graphs=host.graphs), tmp_path / "repository")
    assert "mask_bits" in GRAPH_MODELS


def test_another_mode_is_refused_where_the_graph_has_one(exports):
    graph, host = exports
    open_backend(ModelOptions(artefact=host.folder, preprocess="lite_medsam"))
    with pytest.raises(InputError, match="in mode sam; export it with --imaging host to choose"):
        open_backend(ModelOptions(artefact=graph.folder, preprocess="lite_medsam"))
    assert graph.preprocessing == Preprocessing(128, pixels_in_graph=True)
