"""Sessions on engines: values, CUDA graphs, growing buffers, limits, and what they refuse.

TensorRT's runtime and CUDA are stand-ins here (`support.engines`), plans are ONNX
files; manifests, buffers, recordings and checks are the real ones.
"""

import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
from support.cuda import CpuGpu, stand_in_device
from support.engines import STAND_IN_GPU, VERSIONS, fake_runtime, put_engines
from support.references import prompt_feed

from dbsam_deploy.artefact import graph_file, load_artefact
from dbsam_deploy.core.contract import Geometry, graph_specs
from dbsam_deploy.core.errors import EngineError, InputError, MissingError
from dbsam_deploy.engines import cuda
from dbsam_deploy.engines.cuda import open_device
from dbsam_deploy.engines.kinds import KINDS, TENSORRT, TENSORRT_RTX
from dbsam_deploy.engines.manifest import (
    Flags,
    PassedGate,
    engine_folder,
    read_records,
    sign,
    write_record,
)
from dbsam_deploy.engines.runner import MAX_RECORDINGS
from dbsam_deploy.engines.shapes import axis_sizes, check_outputs, concrete_shapes, size_bytes
from dbsam_deploy.sessions.engine_session import TensorrtRtxSession, TensorrtSession
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession

SIZE = Geometry(128)
SESSIONS = {"tensorrt": TensorrtSession, "tensorrt-rtx": TensorrtRtxSession}


def sign_engines(artefact, kind, target="sm_86"):
    records = read_records(artefact, kind)
    plans = {graph: record.plan.sha256 for graph, record in records.items()}
    parity = PassedGate(replace(STAND_IN_GPU, target=target), {"default": {}}, {}, plans)
    sign(engine_folder(artefact, kind), records, parity)


@pytest.fixture
def built(tiny_artefact, tmp_path):
    """`built(kind)`: a copy of the tiny artefact with verified engines."""

    def build(kind=TENSORRT, signed=True, **changes):
        folder = tmp_path / kind.name
        shutil.copytree(tiny_artefact.folder, folder)
        artefact = put_engines(load_artefact(folder), kind, **changes)
        if signed:
            sign_engines(artefact, kind)
        return artefact

    return build


def open_session(artefact, kind=TENSORRT, gpu=None, version=None, **options):
    gpu = gpu or CpuGpu()
    runtime = fake_runtime(gpu, version or VERSIONS[kind.name])
    device = stand_in_device(gpu)
    return SESSIONS[kind.name](artefact, device=device, runtime=runtime, **options)


def decoder_feed(boxes, rng=None):
    rng = rng or np.random.default_rng()
    return {
        "image_embeddings": rng.standard_normal((1, 256, 8, 8)).astype(np.float32),
        "boxes": (rng.random((1, boxes, 4)) * 128).astype(np.float32),
    }


def feeds(graph):
    rng = np.random.default_rng()
    if graph == "encoder":
        return [{"image": rng.random((n, 3, 128, 128), np.float32)} for n in (1, 3, 1, 1, 1, 4, 1)]
    if graph == "decoder":
        return [decoder_feed(n, rng) for n in (2, 2, 2, 7, 2, 7, 7, 256, 2)]
    pairs = [prompt_feed(rng, box=bool(n % 2), points=n, size=SIZE) for n in (1, 1, 1, 5, 1)]
    return [{name: value[:1] for name, value in feed.items()} for feed in pairs]


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("graph", ["encoder", "decoder", "prompt_decoder"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_values_are_the_graphs_whatever_ran_before(built, kind, graph, cuda_graphs):
    artefact, gpu = built(kind), CpuGpu()
    session = open_session(artefact, kind, gpu, cuda_graphs=cuda_graphs)
    expected = OnnxRuntimeSession(artefact)
    earlier = []
    for feed in feeds(graph):
        found, wanted = session.run(graph, feed), expected.run(graph, feed)
        earlier.append((found, wanted))
    for found, wanted in earlier:  # also: no result is overwritten by a later run
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value)
    recorded = kind is TENSORRT and cuda_graphs
    assert (gpu.counts.get("replayed", 0) > 0) == recorded
    assert (gpu.counts.get("captured", 0) > 0) == recorded
    session.close()
    assert gpu.memory == {}
    assert gpu.graphs == {}
    assert session.backend == kind.name


def test_a_shape_is_recorded_when_it_comes_again_and_then_replayed(built):
    gpu = CpuGpu()
    session = open_session(built(), gpu=gpu)
    counts = []
    for _ in range(4):
        session.run("decoder", decoder_feed(3))
        counts.append((gpu.counts.get("captured", 0), gpu.counts.get("replayed", 0)))
    assert counts == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert gpu.counts["context"] == 2


def test_larger_buffers_end_the_recordings_that_know_the_old_ones(built):
    artefact, gpu = built(), CpuGpu()
    session, expected = open_session(artefact, gpu=gpu), OnnxRuntimeSession(artefact)
    for boxes in (2, 2, 2, 9, 2, 2, 2):
        feed = decoder_feed(boxes)
        found = session.run("decoder", feed)["low_res_masks"]
        np.testing.assert_array_equal(found, expected.run("decoder", feed)["low_res_masks"])
    assert gpu.counts["captured"] == 2  # for two boxes, before and after the growth


def test_the_recording_used_longest_ago_makes_room(built):
    artefact, gpu = built(), CpuGpu()
    session, expected = open_session(artefact, gpu=gpu), OnnxRuntimeSession(artefact)
    session.run("decoder", decoder_feed(20))  # so that nothing grows below
    for boxes in range(1, MAX_RECORDINGS + 4):
        for _ in range(3):
            feed = decoder_feed(boxes)
            found = session.run("decoder", feed)["low_res_masks"]
            np.testing.assert_array_equal(found, expected.run("decoder", feed)["low_res_masks"])
    assert len(gpu.graphs) == MAX_RECORDINGS
    before = gpu.counts["captured"]
    session.run("decoder", decoder_feed(1))  # its recording was dropped
    assert gpu.counts["captured"] == before


def test_threads_take_turns(built):
    artefact = built()
    session, expected = open_session(artefact), OnnxRuntimeSession(artefact)
    wrong = []

    def work():
        for _ in range(6):
            feed = decoder_feed(int(np.random.default_rng().integers(1, 5)))
            found = session.run("decoder", feed)["low_res_masks"]
            if not np.array_equal(found, expected.run("decoder", feed)["low_res_masks"]):
                wrong.append(feed)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("graph", "sizes", "message"),
    [
        ("encoder", {"batch": 5}, "encoder: batch = 5, .* built for 1 to 4"),
        ("decoder", {"batch": 2}, "decoder: batch = 2, .* built for 1 to 1"),
        ("decoder", {"num_boxes": 257}, "num_boxes = 257, .* 1 to 256; split the request"),
        ("prompt_decoder", {"num_points": 65}, "num_points = 65, .* 1 to 64"),
        ("prompt_decoder", {"num_prompts": 257}, "num_prompts = 257, .* 1 to 256"),
    ],
)
def test_sizes_beyond_the_profile_are_named(built, graph, sizes, message):
    sizes = {"batch": 1, "num_boxes": 1, "num_prompts": 1, "num_points": 2, **sizes}
    spec = graph_specs(SIZE)[graph]
    feed = {
        tensor.name: np.zeros([sizes.get(axis, axis) for axis in tensor.axes], tensor.dtype)
        for tensor in spec.inputs
    }
    with pytest.raises(InputError, match=message):
        open_session(built()).run(graph, feed)


def test_a_feed_that_breaks_the_contract_is_refused(built):
    feed = {**decoder_feed(1), "boxes": np.zeros((1, 1, 4))}
    with pytest.raises(InputError, match="boxes: dtype float64"):
        open_session(built()).run("decoder", feed)


def test_a_plan_that_was_never_verified_is_refused(built):
    artefact = built(signed=False)
    with pytest.raises(EngineError, match=r"not compared with PyTorch on sm_86 \(verified anywhe"):
        open_session(artefact)
    open_session(artefact, verified=False).run("decoder", decoder_feed(1))


def test_a_gate_passed_on_another_gpu_does_not_count(built):
    artefact = built(TENSORRT_RTX, signed=False, targets=("sm_86", "sm_120"))
    sign_engines(artefact, TENSORRT_RTX, "sm_120")
    with pytest.raises(EngineError, match=r"on sm_86 \(verified on sm_120\): python -m .* verify"):
        open_session(artefact, TENSORRT_RTX)
    sign_engines(artefact, TENSORRT_RTX, "sm_86")
    records = read_records(artefact, TENSORRT_RTX)
    assert set(records["decoder"].parity) == {"sm_86", "sm_120"}
    open_session(artefact, TENSORRT_RTX)


def test_a_plan_beside_others_than_those_it_was_verified_with_is_refused(built):
    artefact = built()
    folder = engine_folder(artefact, TENSORRT)
    record = read_records(artefact, TENSORRT)["encoder"]
    (folder / "encoder.plan").write_bytes(b"another")
    write_record(folder, replace(record, plan=graph_file(folder / "encoder.plan", folder)))
    with pytest.raises(EngineError, match="beside other plans than those that are here"):
        open_session(artefact)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"version": "11.3.0.1"}, {}, "built with tensorrt 11.3.0.1, and 11.4.0.106 is installed"),
        ({"version": "10.16.1.11"}, {}, "built with tensorrt 10.16.1.11"),
        (
            {},
            {"gpu": CpuGpu((9, 0))},
            r"built for sm_86, and this GPU \(Stand-in GPU\) is sm_90",
        ),
        (
            {"flags": Flags(version_compatible=True), "version": "10.16.1.11"},
            {},
            "built with tensorrt 10.16",
        ),
        (
            {"flags": Flags(version_compatible=True), "version": "11.5.0.1"},
            {},
            "built with tensorrt 11.5",
        ),
        (
            {"flags": Flags(hardware_compatible="ampere_plus")},
            {"gpu": CpuGpu((7, 5))},
            r"sm_86 \(ampere plus\), .* is sm_75",
        ),
    ],
)
def test_another_version_or_gpu_is_refused(built, changes, options, message):
    with pytest.raises(EngineError, match=message):
        open_session(built(**changes), **options)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"flags": Flags(version_compatible=True), "version": "11.3.0.1"}, {}),
        ({"flags": Flags(hardware_compatible="ampere_plus")}, {"gpu": CpuGpu((12, 0))}),
        ({"flags": Flags(hardware_compatible="same_compute_capability")}, {}),
    ],
)
def test_compatible_plans_run_where_they_may(built, changes, options):
    session = open_session(built(signed=False, **changes), verified=False, **options)
    session.run("decoder", decoder_feed(2))


def test_a_changed_plan_is_refused_before_it_is_loaded(built):
    artefact = built()
    path = engine_folder(artefact, TENSORRT) / "decoder.plan"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(EngineError, match=r"decoder.plan was changed after .*; build the engine"):
        open_session(artefact).run("decoder", decoder_feed(1))


@pytest.mark.parametrize("name", ["more.plan", "encoder.plan.json~", "old/encoder.plan"])
def test_what_no_engine_lists_is_refused(built, name):
    artefact = built()
    path = engine_folder(artefact, TENSORRT) / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(EngineError, match=rf"does not list '{name.split('/')[0]}': move it out"):
        open_session(artefact)


@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_a_plan_of_another_graph_is_refused_when_the_session_opens(built, graph):
    artefact = built(signed=False)
    folder, record = engine_folder(artefact, TENSORRT), read_records(artefact, TENSORRT)[graph]
    other = {"encoder": "decoder", "decoder": "prompt_decoder"}[graph]
    shutil.copyfile(artefact.path(other), folder / f"{graph}.plan")
    write_record(folder, replace(record, plan=graph_file(folder / f"{graph}.plan", folder)))
    sign_engines(artefact, TENSORRT)
    with pytest.raises(EngineError, match=rf"the file of {graph} has the inputs .*export again"):
        open_session(artefact)


def test_a_plan_of_another_image_size_or_dtype_is_refused(built, make_artefact, tmp_path):
    artefact = built(signed=False)
    folder, record = engine_folder(artefact, TENSORRT), read_records(artefact, TENSORRT)["encoder"]
    shutil.copyfile(make_artefact(tmp_path / "b", 64).path("encoder"), folder / "encoder.plan")
    write_record(folder, replace(record, plan=graph_file(folder / "encoder.plan", folder)))
    sign_engines(artefact, TENSORRT)
    with pytest.raises(EngineError, match=r"image as float32 \(None, 3, 64, 64\), expected"):
        open_session(artefact)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_new_engines_do_not_reach_a_living_session(built, make_artefact, tmp_path, kind):
    """Neither the graphs that are loaded nor the one that waits for its first point."""
    artefact = built(kind)
    expected, session = OnnxRuntimeSession(artefact), open_session(artefact, kind)
    make_artefact(artefact.folder, seed=1)
    put_engines(load_artefact(artefact.folder), kind)
    for graph in artefact.graphs:
        for feed in feeds(graph)[:2]:
            found = session.run(graph, feed)
            for name, value in expected.run(graph, feed).items():
                np.testing.assert_array_equal(found[name], value)
    with pytest.raises(EngineError, match="was not compared with PyTorch"):
        open_session(load_artefact(artefact.folder), kind)


def test_the_plugins_that_are_loaded_are_those_that_were_hashed(built, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    artefact = built(signed=False)
    folder, record = engine_folder(artefact, TENSORRT), read_records(artefact, TENSORRT)["encoder"]
    library = folder / "libdbsam_plugins.so"
    library.write_bytes(b"the library that was verified")
    write_record(folder, replace(record, plugins=graph_file(library, folder)))
    sign_engines(artefact, TENSORRT)
    loaded = []
    monkeypatch.setattr(
        TensorrtSession, "_load_plugins", lambda self, path: loaded.append(path.read_bytes())
    )
    open_session(artefact)
    (kept,) = (tmp_path / "cache/dbsam_deploy/plugins").iterdir()
    kept.write_bytes(b"another")
    open_session(artefact)
    assert loaded == [b"the library that was verified"] * 2
    library.write_bytes(b"another")
    with pytest.raises(EngineError, match=r"libdbsam_plugins\.so was changed"):
        open_session(artefact)


def test_a_plan_of_another_onnx_file_is_refused(built, make_artefact):
    artefact = built()
    make_artefact(artefact.folder, seed=1)
    with pytest.raises(EngineError, match=r"built from an ONNX file with .*: python -m .* build"):
        open_session(load_artefact(artefact.folder))


def test_without_engines_the_build_command_is_named(tiny_artefact):
    with pytest.raises(EngineError, match=r"no TensorRT-RTX engine of .* --engine tensorrt-rtx"):
        open_session(tiny_artefact, TENSORRT_RTX)


def test_an_invalid_engine_is_explained_by_its_runtime(built):
    gpu = CpuGpu()
    device = stand_in_device(gpu)
    runtime = fake_runtime(gpu, VERSIONS["tensorrt-rtx"], validity=3)
    artefact = built(TENSORRT_RTX)
    with pytest.raises(EngineError, match="not valid here: VERSION_MISMATCH, UNSUPPORTED_CC"):
        TensorrtRtxSession(artefact, device=device, runtime=runtime)


def test_short_memory_is_an_error_of_the_engine(built):
    session = open_session(built(), gpu=CpuGpu(free_bytes=8192))
    with pytest.raises(EngineError, match=r"the GPU has no \d+ MiB left"):
        session.run("decoder", decoder_feed(200))


def test_no_gpu_and_no_pycuda_are_told_apart(monkeypatch):
    monkeypatch.setattr(cuda, "find_gpu", lambda: None)
    with pytest.raises(EngineError, match="engines run on an NVIDIA GPU"):
        open_device()
    monkeypatch.setattr(cuda, "find_gpu", lambda: STAND_IN_GPU)
    monkeypatch.setitem(__import__("sys").modules, "pycuda", None)
    with pytest.raises(MissingError, match="needs pycuda, which"):
        open_device()


def test_unknown_specialization(built):
    with pytest.raises(InputError, match="expected one of lazy, eager, none"):
        open_session(built(TENSORRT_RTX), TENSORRT_RTX, specialization="some")


def test_an_engine_with_other_outputs_is_refused():
    spec = graph_specs(SIZE)["decoder"]
    sizes = axis_sizes(spec, decoder_feed(5))
    assert sizes == {"batch": 1, "num_boxes": 5}
    shapes = concrete_shapes(spec, sizes)
    assert shapes["low_res_masks"] == (1, 5, 1, 32, 32)
    assert size_bytes(spec.outputs[0], shapes["low_res_masks"]) == 5 * 32 * 32 * 4
    check_outputs(spec, shapes, shapes)
    with pytest.raises(EngineError, match="the contract says"):
        check_outputs(spec, shapes, {**shapes, "low_res_masks": (1, 5, 1, 64, 64)})
