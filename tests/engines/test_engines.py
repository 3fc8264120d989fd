"""What engines are made of: limits, GPU, versions, layers, manifests and the builder's process."""

import ctypes
import json
import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from support.engines import put_engines

from dbsam_deploy.core.contract import Geometry, graph_specs
from dbsam_deploy.core.errors import EngineError, InputError, MissingError
from dbsam_deploy.core.imaging import Preprocessing
from dbsam_deploy.engines import process
from dbsam_deploy.engines.device import Gpu, find_gpu, target_name
from dbsam_deploy.engines.kinds import (
    KINDS,
    TENSORRT,
    TENSORRT_RTX,
    check_version,
    cuda_of,
    import_kind,
    kind_named,
)
from dbsam_deploy.engines.layers import (
    PlacedAttention,
    check_plugins,
    read_attention,
    read_layers,
)
from dbsam_deploy.engines.manifest import (
    engine_folder,
    read_plan,
    read_record,
    record_path,
    write_record,
)
from dbsam_deploy.engines.network import BuildJob
from dbsam_deploy.engines.process import describe_builder, run_job
from dbsam_deploy.engines.profiles import (
    MAX_BATCH,
    MAX_ELEMENTS,
    Range,
    check_sizes,
    plan_ranges,
    profile_shapes,
)
from dbsam_deploy.extras import pip_line
from dbsam_deploy.serving.triton_config import GRAPH_MODELS, render_configs

SIZE, IN_GRAPH = Geometry(1024), Preprocessing(1024, pixels_in_graph=True)


def largest_elements(spec, ranges):
    """Tensor name → its number of elements at the largest sizes."""
    return {
        tensor.name: math.prod(ranges[a].most if isinstance(a, str) else a for a in tensor.axes)
        for tensor in (*spec.inputs, *spec.outputs)
    }


@pytest.mark.parametrize("name", list(graph_specs(SIZE)))
def test_every_dynamic_axis_has_a_range_and_every_input_its_shapes(name):
    spec = graph_specs(SIZE)[name]
    ranges = plan_ranges(spec)
    assert set(ranges) == {a for t in spec.inputs for a in t.dynamic_axes.values()}
    shapes = profile_shapes(spec, ranges)
    assert list(shapes) == spec.input_names
    for tensor in spec.inputs:
        least, usual, most = shapes[tensor.name]
        for axis, low, middle, high in zip(tensor.axes, least, usual, most, strict=True):
            assert 1 <= low <= middle <= high
            assert isinstance(axis, str) or low == middle == high == axis


def test_ranges_of_the_box_decoder():
    ranges = plan_ranges(graph_specs(SIZE)["decoder"])
    assert ranges == {"batch": Range(1, 1, 1), "num_boxes": Range(1, 8, 256)}
    points = plan_ranges(graph_specs(SIZE)["prompt_decoder"])["num_points"]
    assert points == Range(1, 2, 64)


@pytest.mark.parametrize("platform", ["onnxruntime", "tensorrt"])
def test_triton_takes_its_largest_batch_from_the_same_table(platform):
    configs = render_configs(IN_GRAPH, dict.fromkeys(GRAPH_MODELS, platform))
    for graph, model in GRAPH_MODELS.items():
        most, ranges = MAX_BATCH[platform][graph], plan_ranges(graph_specs(IN_GRAPH)[graph])
        assert f"max_batch_size: {most}\n" in configs[model]
        assert platform != "tensorrt" or ranges["batch"].most == most


@pytest.mark.parametrize(
    ("size", "most"),
    [(Geometry(1024), 256), (Geometry(2048), 255), (Geometry(1024, embedding_stride=4), 63)],
)
def test_no_tensor_of_the_largest_request_passes_32_bit_indices(size, most):
    for name in ("decoder", "prompt_decoder"):
        spec = graph_specs(size)[name]
        ranges = plan_ranges(spec)
        axis = next(a for a in ranges if a in ("num_boxes", "num_prompts"))
        assert ranges[axis].most == most
        assert max(largest_elements(spec, ranges).values()) <= MAX_ELEMENTS
        upscaled = most * spec.outputs[0].axes[-1] ** 2 * 32
        assert upscaled <= MAX_ELEMENTS
        # Inputs and outputs alone stay below 2 GiB, and eight such requests would not.
        assert sum(largest_elements(spec, ranges).values()) * 4 < 2 * 2**30


def test_sizes_out_of_range_and_ranges_out_of_order():
    spec = graph_specs(SIZE)["decoder"]
    ranges = plan_ranges(spec)
    check_sizes(spec, ranges, {"batch": 1, "num_boxes": 256})
    with pytest.raises(InputError, match="num_boxes = 257, but this engine was built for 1 to 256"):
        check_sizes(spec, ranges, {"batch": 1, "num_boxes": 257})
    with pytest.raises(InputError, match="expected 1 <= least"):
        Range(2, 1, 3)


class Driver:
    """The CUDA driver of a machine with `count` GPUs of compute capability 12.0."""

    def __init__(self, count=1, broken=()):
        self.count, self.broken = count, broken

    def __getattr__(self, name):
        if name in self.broken:
            return lambda *arguments: 999
        return getattr(type(self), f"_{name}").__get__(self)

    def _cuInit(self, flags):  # noqa: N802
        return 0

    def _cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = self.count
        return 0

    def _cuDeviceGet(self, device, number):  # noqa: N802
        device._obj.value = 7
        return 0

    def _cuDeviceGetName(self, buffer, size, device):  # noqa: N802
        assert device.value == 7
        ctypes.memmove(buffer, b"Some GPU\0", 9)
        return 0

    def _cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
        value._obj.value = {75: 12, 76: 0}[attribute]
        return 0

    def _cuDriverGetVersion(self, version):  # noqa: N802
        version._obj.value = 13010
        return 0


def test_the_gpu_is_asked_of_its_driver():
    assert find_gpu(lambda name: Driver()) == Gpu("Some GPU", "sm_120", "13.1")
    assert find_gpu(lambda name: Driver(count=0)) is None
    assert find_gpu(lambda name: Driver(broken=["cuInit"])) is None
    with pytest.raises(EngineError, match=r"with CUDA error 999 \(cudaErrorUnknown: "):
        find_gpu(lambda name: Driver(broken=["cuDeviceGetName"]))
    assert target_name(8, 6) == "sm_86"


def test_no_driver_is_no_gpu():
    def load(name):
        assert name == "libcuda.so.1"
        raise OSError("cannot open shared object file")

    assert find_gpu(load) is None


@pytest.mark.parametrize("version", ["10.15.1.29", "8.6.1", "9.9", "nightly"])
def test_an_older_tensorrt_is_refused(version):
    with pytest.raises(EngineError, match=rf"TensorRT {version} is .* 10\.16 or newer.*--upgrade"):
        check_version(TENSORRT, version)


def test_versions_that_work():
    for version in ("10.16.1.11", "11.0.0.1", "11.4.0.106"):
        check_version(TENSORRT, version)
    check_version(TENSORRT_RTX, "1.7.1.116")
    with pytest.raises(EngineError, match=r"1\.7 or newer"):
        check_version(TENSORRT_RTX, "1.6.1.120")


def test_a_missing_package_names_its_install_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(MissingError, match=re.escape(pip_line("rtx"))):
        import_kind(TENSORRT_RTX)
    with pytest.raises(InputError, match="expected one of tensorrt, tensorrt-rtx"):
        kind_named("trt")
    assert list(KINDS) == ["tensorrt", "tensorrt-rtx"]


LAYERS = [
    {"Name": "_gemm_mha_v2_myl0_17", "LayerType": "kgen", "TacticName": "_gemm_mha_v2_0x957a"},
    {"Name": "__myl_Fc_myl0_3", "LayerType": "gemm", "TacticName": "sm80_xmma_gemm_f16"},
    {"Name": "node_RelPosAttention_0", "LayerType": "PluginV3", "Metadata": ""},
    {"Name": "x", "LayerType": "PluginV3", "Metadata": "[ONNX Layer: node_MsDeformAttn_4]"},
    {"Name": "InstanceNormalization", "LayerType": "PluginV2"},
]
OPERATORS = {"node_RelPosAttention_0": "RelPosAttention", "node_MsDeformAttn_4": "MsDeformAttn"}


def test_plugin_layers_and_fused_attention_are_counted():
    report = read_layers(json.dumps({"Layers": LAYERS}), PlacedAttention(OPERATORS, 3))
    assert report.as_dict() == {
        "layers": 5,
        "plugins": 2,
        "operators": 2,
        "fused_attention": 1,
        "attention": 3,
    }
    check_plugins(report, "encoder.plan")
    without = [layer for layer in LAYERS if layer["LayerType"] != "PluginV3"]
    report = read_layers(json.dumps({"Layers": without}), PlacedAttention(OPERATORS, 3))
    assert report.attention == 4  # the fused operator's own attention is left to TensorRT
    with pytest.raises(EngineError, match=r"encoder.plan: 0 plugin layers for 2 fused operators"):
        check_plugins(report, "encoder.plan")
    one = [layer for layer in LAYERS if layer["Name"] != "x"]
    with pytest.raises(EngineError, match="1 plugin layers for 2"):
        check_plugins(read_layers(json.dumps({"Layers": one}), PlacedAttention(OPERATORS, 3)), "e")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "not understood"),
        ("{}", "not understood"),
        ('{"Layers": ["a layer", "another"]}', "detailed profiling verbosity"),
        ('{"Layers": []}', "detailed profiling verbosity"),
    ],
)
def test_an_inspector_without_details_is_no_proof(text, message):
    with pytest.raises(EngineError, match=message):
        read_layers(text, PlacedAttention({}, 0))


def test_attention_is_read_from_the_file(published_export):
    _, published = published_export
    decoder = read_attention(published.artefact.path("decoder"))
    assert decoder.operators == {}
    # Two layers and a last attention from tokens to pixels; those to tokens have no Softmax node.
    assert decoder.softmax == 2 * 2 + 1
    encoder = read_attention(published.artefact.path("encoder"))
    assert encoder.taken_apart == 8  # blocks of the small ViT
    assert "" not in encoder.operators


def test_a_manifest_is_read_back_equal(tiny_artefact, tmp_path):
    record = _record(tiny_artefact, tmp_path)
    assert read_record(record_path(tmp_path, "decoder")) == record
    assert read_plan(tmp_path, record) == b"a plan"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder.plan", "decoder.plan.json"]


def _record(artefact, folder):
    from dbsam_deploy.artefact import graph_file
    from dbsam_deploy.engines.manifest import EngineRecord, Flags, PassedGate

    (folder / "decoder.plan").write_bytes(b"a plan")
    item = graph_file(folder / "decoder.plan", folder)
    gpu = Gpu("Some GPU", "sm_120", "13.1")
    record = EngineRecord(
        graph="decoder",
        kind="tensorrt",
        precision="fp16",
        plan=item,
        onnx_sha256=artefact.graphs["decoder"].sha256,
        version="11.4.0.106",
        cuda="13",
        built_on=gpu,
        targets=("sm_120",),
        ranges=plan_ranges(graph_specs(artefact.preprocessing)["decoder"]),
        flags=Flags(version_compatible=True, optimization_level=5),
        plugins=replace(item, file="libdbsam_plugins.so"),
        layers={"layers": 3},
        parity={
            "sm_120": PassedGate(
                gpu, {"default": {"dice": 0.5}}, {"dice_drop": 0.1}, {"decoder": "a"}
            )
        },
    )
    write_record(folder, record)
    return record


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda body: body | {"format": 2}, "another manifest format"),
        (lambda body: body | {"targets": ["sm_90"]}, "was edited after it was written"),
        (lambda body: body | {"parity": None}, "was edited"),
        (lambda body: {k: v for k, v in body.items() if k != "seal"}, "not the manifest"),
        (lambda body: [], "not the manifest"),
    ],
)
def test_an_edited_manifest_is_refused(tiny_artefact, tmp_path, edit, message):
    _record(tiny_artefact, tmp_path)
    path = record_path(tmp_path, "decoder")
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(EngineError, match=message):
        read_record(path)


@pytest.mark.parametrize("way", ["missing", "changed", "outside"])
def test_a_plan_that_is_not_the_manifests_is_refused(tiny_artefact, tmp_path, way):
    record = _record(tiny_artefact, tmp_path)
    if way == "missing":
        (tmp_path / "decoder.plan").unlink()
    elif way == "changed":
        (tmp_path / "decoder.plan").write_bytes(b"a plot")
    else:
        record = replace(record, plan=replace(record.plan, file="../decoder.plan"))
    with pytest.raises(EngineError, match="build the engine again"):
        read_plan(tmp_path, record)


def test_manifests_of_another_graph_are_noticed(make_artefact, tmp_path):
    from dbsam_deploy.engines.manifest import read_records

    artefact = put_engines(make_artefact(tmp_path / "a", 64), TENSORRT)
    folder = engine_folder(artefact, TENSORRT)
    os.replace(record_path(folder, "encoder"), record_path(folder, "decoder"))
    with pytest.raises(EngineError, match="describes a tensorrt engine of encoder, expected"):
        read_records(artefact, TENSORRT)


def fake_tensorrt(folder, body, monkeypatch):
    """A module `tensorrt` for builder processes; returns a job for it."""
    start = (
        "import os, sys\nclass Logger:\n    WARNING = 1\n    def __init__(self, severity): pass\n"
    )
    (folder / "tensorrt.py").write_text(start + body)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)
    return BuildJob(kind="tensorrt", onnx="none.onnx", plan=str(folder / "x.plan"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "__version__ = '11.4.0.106'\ndef Builder(logger):\n"
            "    print('[11/23/2026-18:50:24] [TRT] [E] no luck today', flush=True)\n"
            "    os.abort()\n",
            r"tensorrt built no engine of decoder: its process was ended by SIGABRT; its "
            "last words: no luck today",
        ),
        (
            "__version__ = '11.4.0.106'\ndef Builder(logger): sys.exit(3)\n",
            "ended with status 3: it said nothing",
        ),
        ("__version__ = '10.3.0'\n", r"TensorRT 10\.3\.0 is installed, and 10\.16 or newer"),
        ("raise ImportError('libnvinfer.so.11: cannot open')\n", "libnvinfer.so.11: cannot open"),
    ],
)
def test_a_builder_that_ends_its_process_is_an_error_of_the_engine(
    body, message, tmp_path, monkeypatch
):
    job = fake_tensorrt(tmp_path, body, monkeypatch)
    with pytest.raises(EngineError, match=message) as caught:
        run_job(job, tmp_path, "decoder")
    assert "decoder.build.log" in str(caught.value)
    assert BuildJob.from_json((tmp_path / "decoder.job.json").read_text()) == job


def test_a_builder_that_is_there_is_described_by_its_own_process(tmp_path, monkeypatch):
    fake_tensorrt(tmp_path, "__version__ = '11.4.0.106'\n", monkeypatch)
    builder = describe_builder(TENSORRT)
    assert (builder.version, builder.kind) == ("11.4.0.106", TENSORRT)
    assert builder.targets == (() if builder.gpu is None else (builder.gpu.target,))
    monkeypatch.setattr(process, "run_python", None)  # where there is none, no process is begun
    with pytest.raises(EngineError, match=r"^TensorRT does not start: .*none_such, which is not"):
        describe_builder(replace(TENSORRT, module="none_such"))


@pytest.mark.rtx
def test_tensorrt_rtx_says_what_it_builds_for():
    builder = describe_builder(TENSORRT_RTX)
    assert {"sm_86", "sm_89", "sm_120"} <= set(builder.targets)
    assert "sm_90" not in builder.targets
    assert builder.cuda == cuda_of(TENSORRT_RTX) != ""


def test_a_job_survives_its_json():
    spec = graph_specs(SIZE)["decoder"]
    job = BuildJob(
        kind="tensorrt",
        onnx="a.onnx",
        plan="a.plan",
        targets=("sm_86",),
        shapes=profile_shapes(spec, plan_ranges(spec)),
        dtypes={"boxes": "float32"},
    )
    assert BuildJob.from_json(job.to_json()) == job
    assert np.prod(job.shapes["boxes"][2]) == 256 * 4
