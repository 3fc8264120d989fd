"""Engines are signed when they passed their gate on the GPU, and stay unsigned if they miss it."""

import shutil
from dataclasses import replace

import pytest
from support.cuda import CpuGpu, stand_in_device
from support.engines import STAND_IN_GPU, CpuEngine, fake_runtime, put_engines

from dbsam_deploy.artefact import graph_file, load_artefact
from dbsam_deploy.core.errors import AccuracyError, EngineError
from dbsam_deploy.engines.device import Gpu
from dbsam_deploy.engines.kinds import KINDS, TENSORRT, TENSORRT_RTX
from dbsam_deploy.engines.manifest import (
    engine_folder,
    plugin_library,
    read_records,
    verified_plans,
    write_record,
)
from dbsam_deploy.recipe import Gate, Parity
from dbsam_deploy.serving.repository import build_repository, load_repository
from dbsam_deploy.sessions.engine_session import TensorrtSession
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession
from dbsam_deploy.verification.cases import bundled_examples, load_cases
from dbsam_deploy.verification.engine_parity import unverified_here, verify_engines

GATE = Gate(0.999, 0.98, 0.95, 0.002)
PLUGIN_LAYERS = [
    {"Name": "block.3.attn", "LayerType": "PluginV3", "Metadata": "[ONNX Layer: RelPosAttention_0]"}
]


@pytest.fixture
def copied(tiny_artefact, tmp_path):
    shutil.copytree(tiny_artefact.folder, tmp_path / "artefact")
    return load_artefact(tmp_path / "artefact")


@pytest.fixture(scope="module")
def cases():
    return load_cases(bundled_examples(), Parity(3, 3, 20, 16))


def stand_ins(layers=None, version="11.4.0.106"):
    gpu = CpuGpu()
    return {
        "device": stand_in_device(gpu),
        "runtime": fake_runtime(gpu, version, layers),
    }


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_engines_that_agree_are_signed_and_can_then_be_used(copied, cases, kind):
    put_engines(copied, kind)
    version = read_records(copied, kind)["encoder"].version
    seen, reference = [], OnnxRuntimeSession(copied)
    records = verify_engines(
        copied, kind, reference, cases, GATE, progress=seen.append, **stand_ins(version=version)
    )
    ways = ["default"] if kind is TENSORRT else ["general kernels", "special kernels"]
    assert seen == [case.name for case in cases] * len(ways)
    for record in records.values():
        (parity,) = record.parity.values()
        assert parity.gpu == STAND_IN_GPU
        assert list(parity.figures) == ways
        assert parity.figures[ways[0]]["embedding_cosine"] == pytest.approx(1, abs=1e-6)
        assert parity.gate["embedding_cosine"] == 0.999
        assert record.layers["fused_attention"] == 1
    assert not unverified_here(records, Gpu("any", "sm_86", "13.0"))
    assert unverified_here(put_again(copied, kind), Gpu("any", "sm_86", "13.0"))


def test_tensorrt_rtx_runs_with_general_and_then_with_special_kernels(copied, cases, monkeypatch):
    put_engines(copied, TENSORRT_RTX)
    kernels, options = [], stand_ins(version="1.7.1.116")
    create = CpuEngine.create_execution_context

    def noted(engine, config):
        kernels.append(config.dynamic_shapes_kernel_specialization_strategy)
        return create(engine, config)

    monkeypatch.setattr(CpuEngine, "create_execution_context", noted)
    verify_engines(copied, TENSORRT_RTX, OnnxRuntimeSession(copied), cases[:1], GATE, **options)
    known = options["runtime"].DynamicShapesKernelSpecializationStrategy
    assert list(dict.fromkeys(kernels)) == [known.NONE, known.EAGER]


def put_again(artefact, kind):
    folder = engine_folder(artefact, kind)
    for record in read_records(artefact, kind).values():
        write_record(folder, replace(record, parity=None))
    return read_records(artefact, kind)


def test_where_the_gpu_is_another_one_nothing_has_to_be_verified(copied):
    put_engines(copied, TENSORRT_RTX)
    records = read_records(copied, TENSORRT_RTX)
    assert not unverified_here(records, None)
    assert not unverified_here(records, Gpu("any", "sm_90", "13.0"))


def test_a_plan_with_other_numbers_misses_the_gate_and_stays_unsigned(
    copied, cases, make_artefact, tmp_path
):
    put_engines(copied, TENSORRT)
    other = make_artefact(tmp_path / "other", seed=7)
    folder = engine_folder(copied, TENSORRT)
    shutil.copyfile(other.path("decoder"), folder / "decoder.plan")
    record = read_records(copied, TENSORRT)["decoder"]
    write_record(folder, replace(record, plan=graph_file(folder / "decoder.plan", folder)))
    with pytest.raises(AccuracyError, match=r"TensorRT fp32 tiny_test on Stand-in GPU misses its"):
        verify_engines(copied, TENSORRT, OnnxRuntimeSession(copied), cases, GATE, **stand_ins())
    assert all(record.parity is None for record in read_records(copied, TENSORRT).values())
    with pytest.raises(EngineError, match="was not compared with PyTorch"):
        TensorrtSession(copied, **stand_ins())


def test_fused_operators_that_are_no_plugins_are_refused(copied, cases, monkeypatch, tmp_path):
    from dbsam_deploy.engines.layers import PlacedAttention
    from dbsam_deploy.kernels import plugin_registry
    from dbsam_deploy.verification import engine_parity

    library = engine_folder(copied, TENSORRT) / "libdbsam_plugins.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"a library")
    put_engines(copied, TENSORRT, plugins=graph_file(library, library.parent))
    loaded = []
    monkeypatch.setattr(plugin_registry, "load_plugins", lambda path, runtime: loaded.append(path))
    attention = PlacedAttention({"RelPosAttention_0": "RelPosAttention"}, 2)
    monkeypatch.setattr(engine_parity, "read_attention", lambda path: attention)
    reference = OnnxRuntimeSession(copied)
    with pytest.raises(EngineError, match="0 plugin layers for 1 fused operators"):
        verify_engines(copied, TENSORRT, reference, cases, GATE, **stand_ins())
    assert all(record.parity is None for record in read_records(copied, TENSORRT).values())
    records = verify_engines(
        copied, TENSORRT, reference, cases, GATE, **stand_ins(layers=PLUGIN_LAYERS)
    )
    assert {record.layers["plugins"] for record in records.values()} == {1}
    assert {path.read_bytes() for path in loaded} == {b"a library"}

    repository = build_repository(copied, tmp_path / "repository")
    assert set(repository.platforms.values()) == {"tensorrt"}
    served = repository.folder / repository.plugins
    assert served.read_bytes() == b"a library"
    assert load_repository(repository.folder) == repository
    built = records["encoder"]
    assert repository.engine["tensorrt"] == built.version
    assert repository.engine["cuda"] == built.cuda
    library.write_bytes(b"changed")
    with pytest.raises(EngineError, match="was changed after"):
        plugin_library(library.parent, records["encoder"])


def test_verified_plans_are_served_and_unverified_ones_are_not(copied, cases, tmp_path):
    assert verified_plans(copied) == {}
    put_engines(copied, TENSORRT)
    assert verified_plans(copied) == {}
    repository = build_repository(copied, tmp_path / "repository")
    assert set(repository.platforms.values()) == {"onnxruntime"}
    verify_engines(copied, TENSORRT, OnnxRuntimeSession(copied), cases, GATE, **stand_ins())
    repository = build_repository(copied, tmp_path / "repository")
    assert set(repository.platforms.values()) == {"tensorrt"}
    assert repository.plugins == ""
    folder = repository.folder / "dbsam_decoder"
    assert {path.name for path in (folder / "1").iterdir()} == {"model.plan", "model.onnx"}
    assert "max_batch_size: 1\n" in (folder / "config.pbtxt").read_text()
    (engine_folder(copied, TENSORRT) / "decoder.plan").write_bytes(b"changed")
    with pytest.raises(EngineError, match="was changed after"):
        build_repository(copied, tmp_path / "repository")


def test_tensorrt_rtx_plans_are_not_for_triton(copied, cases, tmp_path):
    put_engines(copied, TENSORRT_RTX)
    reference = OnnxRuntimeSession(copied)
    verify_engines(copied, TENSORRT_RTX, reference, cases, GATE, **stand_ins(version="1.7.1.116"))
    repository = build_repository(copied, tmp_path / "repository")
    assert set(repository.platforms.values()) == {"onnxruntime"}
