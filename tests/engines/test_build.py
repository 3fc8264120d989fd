"""ONNX → plan: real TensorRT-RTX engines without a GPU; what a build asks, keeps and refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support.fp8_graphs import encoder_in_fp8

from dbsam_deploy.artefact import Artefact, graph_file, write_artefact
from dbsam_deploy.core.contract import graph_specs
from dbsam_deploy.core.errors import EngineError, InputError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.engines import build as engine_build
from dbsam_deploy.engines.build import (
    EngineOptions,
    Request,
    build_engines,
    check_options,
    choose_engines,
    parse_targets,
)
from dbsam_deploy.engines.device import Gpu
from dbsam_deploy.engines.kinds import TENSORRT, TENSORRT_RTX
from dbsam_deploy.engines.manifest import Flags, engine_folder, read_records, write_record
from dbsam_deploy.engines.process import Builder
from dbsam_deploy.engines.profiles import plan_ranges
from dbsam_deploy.files.atomic import sha256_of, write_atomically
from dbsam_deploy.files.private import cache_folder
from dbsam_deploy.model import variant_config
from dbsam_deploy.verification.engine_parity import unverified_here

SIZE = 256
GPU = Gpu("NVIDIA H100 PCIe", "sm_90", "13.0")


def artefact_of(paths: dict[str, Path], how: Preprocessing, precision: str) -> Artefact:
    folder = next(iter(paths.values())).parent
    artefact = Artefact(
        folder=folder,
        variant="db_sam_tiny",
        precision=precision,
        preprocessing=how,
        graphs={name: graph_file(path, folder) for name, path in paths.items()},
        weights={"source": "shipped", "sha256": None, "trained": True, "note": ""},
    )
    write_artefact(artefact)
    return artefact


@pytest.fixture(scope="module")
def rtx():
    """`rtx(targets)`: a request to the installed TensorRT-RTX."""
    return lambda *targets: check_options(EngineOptions(TENSORRT_RTX, targets))


@pytest.fixture(scope="module")
def rtx_here() -> Builder:
    return engine_build.describe_builder(TENSORRT_RTX)


@pytest.fixture
def int8_encoder(published_int8, tmp_path) -> Artefact:
    """The encoder of an int8 export, with ranges from real images."""
    _, published = published_int8
    path = Path(shutil.copy(published.artefact.path("encoder"), tmp_path))
    return artefact_of({"encoder": path}, Preprocessing(SIZE), "int8")


@pytest.fixture
def fp8_encoder(float_graphs, tmp_path) -> Artefact:
    config = variant_config("db_sam_tiny", image_size=SIZE)
    path = encoder_in_fp8(float_graphs / "encoder.onnx", config, tmp_path)
    return artefact_of({"encoder": path}, Preprocessing(SIZE), "fp8")


@pytest.fixture
def small_fp8_encoder(exported_graph, small_models, tmp_path) -> Artefact:
    """LiteMedSAM's at 64 px: a fifth of the nodes, no fused operator."""
    config = small_models("lite_medsam").config
    path = encoder_in_fp8(exported_graph("lite_medsam", "encoder", "fp8"), config, tmp_path)
    return artefact_of({"encoder": path}, config.frame, "fp8")


def test_half_precision_engines_with_fused_operators_for_two_gpus(published_export, rtx, tmp_path):
    _, published = published_export
    shutil.copytree(published.artefact.folder, tmp_path / "fp16")
    artefact = replace(published.artefact, folder=tmp_path / "fp16")
    domains = {n.domain for n in onnx.load(artefact.path("encoder")).graph.node}
    assert "dbsam" in domains  # function bodies are parsed as they are
    said = []
    request = rtx("sm_86", "sm_89")  # sm_120 below
    records = build_engines(artefact, request, said.append)
    assert said == [f"building tensorrt-rtx {graph}" for graph in artefact.graphs]
    folder = engine_folder(artefact, TENSORRT_RTX)
    for graph, record in records.items():
        plan = folder / f"{graph}.plan"
        assert (record.plan.sha256, record.plan.size_bytes) == (
            sha256_of(plan),
            plan.stat().st_size,
        )
        assert record.targets == ("sm_86", "sm_89")
        assert record.onnx_sha256 == artefact.graphs[graph].sha256
        assert (record.parity, record.layers, record.built_on) == (None, None, None)
        assert record.version == request.builder.version
    assert json.loads((folder / "encoder.plan.json").read_text())["parity"] is None
    assert read_records(artefact, TENSORRT_RTX) == records
    assert {path.name for path in folder.parent.iterdir()} == {"tensorrt-rtx"}
    assert {path.name for path in folder.iterdir()} == {
        *(f"{graph}.plan" for graph in artefact.graphs),
        *(f"{graph}.plan.json" for graph in artefact.graphs),
    }
    assert not unverified_here(records, None)
    again = []
    assert build_engines(artefact, request, again.append) == records
    assert sorted(again) == [f"tensorrt-rtx {graph} was built before" for graph in sorted(records)]


@pytest.mark.parametrize("graph", ["decoder", pytest.param("encoder", marks=pytest.mark.slow)])
def test_a_float32_engine(float_graphs, rtx, tmp_path, graph):
    path = Path(shutil.copy(float_graphs / f"{graph}.onnx", tmp_path))
    artefact = artefact_of({graph: path}, Preprocessing(SIZE), "fp32")
    (record,) = build_engines(artefact, rtx("sm_89")).values()
    assert record.precision == "fp32"
    assert record.plan.size_bytes > artefact.graphs[graph].size_bytes // 2
    assert not record.flags.tf32


@pytest.mark.parametrize(
    ("encoder", "kind", "targets", "pairs"),
    [
        ("int8_encoder", onnx.TensorProto.INT8, ("sm_120",), 30),
        ("small_fp8_encoder", onnx.TensorProto.FLOAT8E4M3FN, ("sm_89", "sm_120"), 10),
        pytest.param(
            *("fp8_encoder", onnx.TensorProto.FLOAT8E4M3FN, ("sm_89", "sm_120"), 30),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_calibrated_graphs_become_engines(request, rtx, encoder, kind, targets, pairs):
    """They are built, not run."""
    artefact = request.getfixturevalue(encoder)
    graph = onnx.load(artefact.path("encoder")).graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) > pairs
    assert sum(tensor.data_type == kind for tensor in graph.initializer) > 40
    (record,) = build_engines(artefact, rtx(*targets)).values()
    assert record.precision == artefact.precision
    assert record.targets == targets
    assert record.plan.size_bytes > 100_000
    body = json.loads((engine_folder(artefact, TENSORRT_RTX) / "encoder.plan.json").read_text())
    assert (body["parity"], body["built_on"]) == (None, None)


def wrong_graph(folder: Path, make) -> Artefact:
    """An artefact whose decoder is a graph of `make(inputs, outputs)`."""
    spec = graph_specs(Preprocessing(64))["decoder"]
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, onnx.TensorProto.FLOAT, t.axes) for t in tensors]
        for tensors in (spec.inputs, spec.outputs)
    )
    model = helper.make_model(
        make(inputs, outputs),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("unheard", 1)],
        ir_version=9,
    )
    onnx.save(model, folder / "decoder.onnx")
    return artefact_of({"decoder": folder / "decoder.onnx"}, Preprocessing(64), "fp32")


def test_an_operator_that_nobody_has_is_named(rtx, tmp_path):
    def make(inputs, outputs):
        names = [[item.name for item in items] for items in (inputs, outputs)]
        node = helper.make_node("Mystery", *names, name="node_7", domain="unheard")
        return helper.make_graph([node], "g", inputs, outputs)

    artefact = wrong_graph(tmp_path, make)
    with pytest.raises(EngineError, match=r"the ONNX parser refuses it: .*'node_7', Mystery"):
        build_engines(artefact, rtx("sm_86"))
    folder = engine_folder(artefact, TENSORRT_RTX)
    left = {path.name for path in folder.with_name(".tensorrt-rtx.work").glob("scratch/*")}
    assert left == {"decoder.job.json", "decoder.build.log"}
    assert not folder.exists()


def test_a_graph_with_other_inputs_than_the_contract_is_refused(rtx, tmp_path):
    def make(inputs, outputs):
        inputs[1] = helper.make_tensor_value_info("box", onnx.TensorProto.FLOAT, [1, 4])
        zero = numpy_helper.from_array(np.zeros((1, 1, 1, 16, 16), np.float32), "zero")
        nodes = [
            helper.make_node("Identity", ["zero"], [outputs[0].name]),
            helper.make_node("ReduceMax", ["zero"], [outputs[1].name]),
            helper.make_node("Identity", ["box"], ["unused"]),
        ]
        return helper.make_graph(nodes, "g", inputs, outputs, [zero])

    artefact = wrong_graph(tmp_path, make)
    with pytest.raises(EngineError, match="the contract says"):
        build_engines(artefact, rtx("sm_86"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": ("sm_90",)}, EngineError, r"does not build for sm_90: it knows .*sm_120"),
        ({}, InputError, r"name the GPUs, for example --target sm_86,sm_89"),
        ({"flags": Flags(version_compatible=True)}, InputError, "go with --engine tensorrt"),
        ({"flags": Flags(hardware_compatible="ampere_plus")}, InputError, "go with --engine"),
        ({"flags": Flags(optimization_level=6)}, InputError, "expected 0 to 5"),
        ({"flags": Flags(optimization_level=5)}, InputError, "the same engine at every level"),
        ({"flags": Flags(hardware_compatible="all")}, InputError, "expected one of none"),
        ({"flags": Flags(quick_plugins=True)}, InputError, "--quick-plugins goes with --engine"),
        ({"plugins": Path("x.so")}, InputError, "--plugins goes with --engine tensorrt"),
    ],
)
@pytest.mark.rtx
def test_options_of_tensorrt_rtx_that_cannot_be(rtx_here, options, error, message, monkeypatch):
    monkeypatch.setattr(engine_build, "describe_builder", lambda kind: replace(rtx_here, gpu=None))
    with pytest.raises(error, match=message):
        check_options(EngineOptions(TENSORRT_RTX, **options))


def fake_builder(monkeypatch, gpu=GPU):
    """TensorRT 11 on a machine with a GPU: `check_options` sees it, nothing is built."""
    targets = () if gpu is None else (gpu.target,)
    builder = Builder(TENSORRT, "11.4.0.106", "13", targets, gpu)
    monkeypatch.setattr(engine_build, "describe_builder", lambda kind: builder)
    monkeypatch.setattr(engine_build, "find_gpu", lambda: gpu)
    return builder


def test_tensorrt_builds_on_its_gpu_only(monkeypatch):
    fake_builder(monkeypatch)
    assert check_options(EngineOptions()).options.targets == ("sm_90",)
    with pytest.raises(InputError, match="--target goes with --engine tensorrt-rtx"):
        check_options(EngineOptions(targets=("sm_90",)))
    with pytest.raises(InputError, match=r"none\.so: no such plugin library"):
        check_options(EngineOptions(plugins=Path("none.so")))
    fake_builder(monkeypatch, gpu=None)
    with pytest.raises(EngineError, match="there is no NVIDIA GPU here: build on the GPU machine"):
        check_options(EngineOptions())


def test_what_auto_builds(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fake_builder(monkeypatch)
    note = choose_engines("auto", (), tmp_path).note
    assert "there is no plugin library build/plugins/libdbsam_plugins.so: `python -m" in note
    (tmp_path / "build" / "plugins").mkdir(parents=True)
    (tmp_path / "build" / "plugins" / "libdbsam_plugins.so").touch()
    assert isinstance(choose_engines("auto", (), tmp_path).request, Request)
    assert choose_engines("none", (), tmp_path).request is None
    fake_builder(monkeypatch, gpu=None)
    choice = choose_engines("auto", (), tmp_path)
    assert choice.request is None
    assert "\n" not in choice.note
    assert choice.note.startswith("no engines were built (there is no NVIDIA GPU here); to build")
    assert f"--artefact {tmp_path} --engine tensorrt" in choice.note

    def missing(kind):
        raise EngineError("TensorRT cannot be imported")

    monkeypatch.setattr(engine_build, "describe_builder", missing)
    monkeypatch.setattr(engine_build, "find_gpu", lambda: GPU)
    note = choose_engines("auto", (), tmp_path).note
    assert note.startswith("no engines were built (TensorRT cannot be imported)")
    with pytest.raises(EngineError, match="cannot be imported"):
        choose_engines("tensorrt", (), tmp_path)
    with pytest.raises(InputError, match="--target goes with"):
        choose_engines("auto", ("sm_86",), tmp_path)
    with pytest.raises(InputError, match="expected one of auto, none, tensorrt"):
        choose_engines("trt", (), tmp_path)


def test_targets_on_the_command_line():
    assert parse_targets("sm_86, 120") == ("sm_86", "sm_120")
    for text in ("ada", "sm_", "", "sm_86;sm_89"):
        with pytest.raises(Exception, match="expected GPUs such as"):
            parse_targets(text)


def fake_run(jobs, layers):
    """A builder process that writes a plan and the inspector's answer."""

    def run_job(job, folder, graph):
        jobs.append(job)
        with write_atomically(Path(job.plan)) as stream:
            stream.write(f"plan of {graph}".encode())
        Path(job.layers).write_text(json.dumps({"Layers": layers}))
        with Path(job.timing_cache).open("a") as stream:
            stream.write(graph + " ")
        return {"network_layers": 1, "seconds": 0.1}

    return run_job


def test_a_tensorrt_build_has_a_timing_cache_and_its_layers(make_artefact, monkeypatch, tmp_path):
    artefact, jobs = make_artefact(tmp_path / "a", 64), []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake_builder(monkeypatch)
    layers = [{"Name": "_gemm_mha_v2", "LayerType": "kgen"}]
    monkeypatch.setattr(engine_build, "run_job", fake_run(jobs, layers))
    flags = Flags(hardware_compatible="same_compute_capability", optimization_level=4)
    records = build_engines(artefact, check_options(EngineOptions(flags=flags)))
    folder = engine_folder(artefact, TENSORRT)
    for job in jobs:
        assert (job.targets, job.plugins, job.flags) == ((), "", flags)
        paths = (job.onnx, job.plan, job.layers, job.timing_cache)
        assert all(Path(path).is_absolute() for path in paths)
    (timings,) = cache_folder("tensorrt-timings").iterdir()
    assert timings.name == f"nvidia-h100-pcie-sm-90-11.4.0.106-{sha256_of(timings)}.timing"
    assert sorted(timings.read_text().split()) == ["decoder", "encoder", "prompt_decoder"]
    record = records["encoder"]
    assert record.built_on == GPU
    assert record.layers["fused_attention"] == 1
    assert record.ranges == plan_ranges(graph_specs(artefact.preprocessing)["encoder"])
    assert (folder / "encoder.plan").read_bytes() == b"plan of encoder"
    # A newer driver builds nothing again, another GPU or other flags build everything.
    jobs.clear()
    fake_builder(monkeypatch, replace(GPU, cuda="13.2"))
    build_engines(artefact, check_options(EngineOptions(flags=flags)))
    assert jobs == []
    (folder / "decoder.plan").write_bytes(b"damaged")
    said = []
    build_engines(artefact, check_options(EngineOptions(flags=flags)), said.append)
    assert len(said) == 3
    assert [line for line in said if "before" not in line] == ["building tensorrt decoder"]
    assert (folder / "decoder.plan").read_bytes() == b"plan of decoder"
    jobs.clear()
    fake_builder(monkeypatch, replace(GPU, name="NVIDIA H200"))
    build_engines(artefact, check_options(EngineOptions(flags=flags)))
    assert len(jobs) == 3
    build_engines(artefact, check_options(EngineOptions()))
    assert len(jobs) == 6
    assert unverified_here(read_records(artefact, TENSORRT), GPU)


@pytest.fixture
def fused(make_artefact, tmp_path, monkeypatch):
    """An artefact whose encoder has one fused operator, and a plugin library."""
    artefact = make_artefact(tmp_path / "a", 64)
    model = onnx.load(artefact.path("encoder"))
    node = helper.make_node("RelPosAttention", ["image"], ["unused"], "attention_3", domain="dbsam")
    model.graph.node.append(node)
    onnx.save(model, artefact.path("encoder"))
    graphs = {**artefact.graphs, "encoder": graph_file(artefact.path("encoder"), artefact.folder)}
    artefact = replace(artefact, graphs=graphs)
    library = tmp_path / "plugins" / "libdbsam_plugins.so"
    library.parent.mkdir()
    built = "tensorrt=11.4.0 cuda=13.0 architectures=90"
    library.write_bytes(f"code\0dbsam_plugins_build: {built}\0".encode())
    fake_builder(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return artefact, library


PLUGIN = [{"Name": "attention_3", "LayerType": "PluginV3"}]


def test_fused_operators_need_the_plugin_library(fused, monkeypatch):
    artefact, _ = fused
    monkeypatch.setattr(engine_build, "run_job", fake_run([], PLUGIN))
    with pytest.raises(EngineError, match=r"RelPosAttention.*no plugin library build/plugins/lib"):
        build_engines(artefact, check_options(EngineOptions()))


def test_the_plugin_library_goes_with_the_plans_that_need_it(fused, monkeypatch):
    artefact, library = fused
    jobs = []
    monkeypatch.setattr(engine_build, "run_job", fake_run(jobs, PLUGIN))
    request = check_options(EngineOptions(plugins=library))
    records = build_engines(artefact, request)
    folder = engine_folder(artefact, TENSORRT)
    assert records["encoder"].plugins.sha256 == sha256_of(library)
    assert records["decoder"].plugins is None
    assert records["encoder"].layers["plugins"] == 1
    loaded = {Path(job.onnx).stem: job.plugins for job in jobs}
    copy = folder.with_name(".tensorrt.work").resolve() / "files" / library.name
    assert loaded == {"encoder": str(copy), "decoder": "", "prompt_decoder": ""}
    assert (folder / library.name).read_bytes() == library.read_bytes()
    signed = replace(records["encoder"], parity={})
    write_record(folder, signed)
    assert build_engines(artefact, request)["encoder"] == signed
    apart = check_options(EngineOptions(take_apart=True))
    assert build_engines(artefact, apart)["encoder"].plugins is None
    assert not (folder / library.name).exists()


def test_attention_that_was_not_fused_is_not_published(fused, monkeypatch):
    artefact, library = fused
    layers = [{"Name": "__myl_MatMul", "LayerType": "gemm"}]
    monkeypatch.setattr(engine_build, "run_job", fake_run([], layers))
    with pytest.raises(EngineError, match="0 plugin layers for 1 fused operators"):
        build_engines(artefact, check_options(EngineOptions(plugins=library)))
    assert not engine_folder(artefact, TENSORRT).exists()
