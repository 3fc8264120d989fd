"""Quickly deployable plugins in TensorRT's own registration.

The real Python bindings run here over lean TensorRT's registry; the functions that lean TensorRT
lacks (builder and parser, unused here) are stubs.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.engines import worker
from dbsam_deploy.engines.layers import PlacedAttention
from dbsam_deploy.engines.manifest import Flags
from dbsam_deploy.engines.network import BuildJob
from dbsam_deploy.kernels import quick_plugins
from dbsam_deploy.kernels.nvrtc import entry_names
from dbsam_deploy.kernels.quick_plugins import compile_kernel
from dbsam_deploy.kernels.quick_sources import (
    depthwise_conv_gelu_source,
    ms_deform_attn_source,
    rel_pos_attention_source,
    windowed_attention_source,
)

ROOT = Path(__file__).resolve().parents[2]
DEFORM: dict[str, Any] = {
    "num_heads": 2,
    "num_points": 3,
    "level_shapes": [9, 13, 2, 3],
    "query_shapes": [3, 5, 10, 9],
}
REL_POS: dict[str, Any] = {"num_heads": 2, "side": 9, "scale": 0.125}
DEPTHWISE = {"height": 5, "width": 7}
# --- TensorRT's registration

STUBS = {
    "libnvinfer.so.11": (
        "void* createInferBuilder_INTERNAL(void) { return 0; }"
        "void* getBuilderPluginRegistry(int kind) { return 0; }"
    ),
    "libnvinfer_plugin.so.11": "int initLibNvInferPlugins(void* log, const char* n) { return 1; }",
    "libnvonnxparser.so.11": (
        "void* createNvOnnxParserRefitter_INTERNAL(void) { return 0; }"
        "void* createNvOnnxParser_INTERNAL(void) { return 0; }"
        "int getNvOnnxParserVersion(void) { return 0; }"
    ),
}


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which `import tensorrt` gives the real bindings over lean TensorRT."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc on the PATH")
    places = {}
    wheels = {
        "tensorrt_bindings": "tensorrt-cu13-bindings",
        "tensorrt_lean_libs": "tensorrt-lean-cu13-libs",
    }
    for name, wheel in wheels.items():
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            pytest.skip(f"no {name}: pip install {wheel}")
        places[name] = Path(found.submodule_search_locations[0])
    folder, lean = tmp_path_factory.mktemp("bindings"), places["tensorrt_lean_libs"]
    for name, code in STUBS.items():
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-xc", "-"]
        command += ["-o", str(folder / name), "-Wl,--no-as-needed", f"-L{lean}"]
        command += ["-l:libnvinfer_lean.so.11", f"-Wl,-rpath,{lean}"]
        subprocess.run(command, input=code, text=True, check=True)
    package = folder / "tensorrt" / "plugin"
    package.mkdir(parents=True)
    names = "from tensorrt_bindings{} import *\n"
    package.joinpath("__init__.py").write_text(names.format(".plugin"))
    version = "from tensorrt_bindings import __version__\n"
    package.parent.joinpath("__init__.py").write_text(names.format("") + version)
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join((str(folder), os.environ.get("LD_LIBRARY_PATH", ""))),
        "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))),
    }


DRIVE = """
import json, sys
from types import SimpleNamespace
import numpy as np
import tensorrt as trt
from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.kernels.quick_plugins import register_quick_plugins

class Size:  # stands for IDimensionExpr; -1 is known only at run time
    def __init__(self, value): self.value = value
    def is_constant(self): return self.value >= 0
    def get_constant_value(self): return self.value

class Builder:  # stands for IExprBuilder
    constant = Size
    def operation(self, op, first, second):
        assert op == trt.DimensionOperation.PROD, op
        known = first.is_constant() and second.is_constant()
        return Size(first.value * second.value if known else -second.value)

class Extra(list):
    nbSymExprs = None

trt.IDimensionExpr, trt.DimsExprs = Size, lambda length: [None] * length
import tensorrt_bindings.plugin._tensor as symbolic
symbolic.SymExprImpl = lambda expr: expr._expr.value

def drive(op, attributes, shapes):
    creator = trt.get_plugin_registry().get_creator(op, "1", "dbsam")
    names = [field.name for field in creator.field_names]
    # As the ONNX parser gives them: INT32 and FLOAT32, in the order of the creator's fields.
    kinds = [("FLOAT32", np.float32) if name == "scale" else ("INT32", np.int32) for name in names]
    # A field only points to its numbers.
    values = [np.array(attributes[n], t).reshape(-1) for n, (_, t) in zip(names, kinds)]
    fields = trt.PluginFieldCollection([
        trt.PluginField(name, value, getattr(trt.PluginFieldType, kind))
        for name, value, (kind, _) in zip(names, values, kinds)])
    phase, request = trt.TensorRTPhase.BUILD, trt.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin(op, "dbsam", fields, phase, request)
    types = plugin.get_output_data_types([trt.float16] * len(shapes), [len(s) for s in shapes])
    (out,) = plugin.get_output_shapes(shapes, [], Builder())
    tensors = []
    for shape in [*shapes, [size.value for size in out]]:
        tensor, desc = trt.DynamicPluginTensorDesc(), trt.PluginTensorDesc()
        desc.dims, desc.type, desc.format = trt.Dims(shape), trt.float16, trt.TensorFormat.LINEAR
        tensor.desc = desc
        tensors.append(tensor)
    plugin.set_tactic(0)
    launch, extra = SimpleNamespace(), Extra()
    plugin.get_launch_params(shapes, tensors, len(shapes), launch, extra, Builder())
    descs = [tensor.desc for tensor in tensors]
    name, ptx = plugin.get_kernel(descs[:-1], descs[-1:])
    return {"fields": names, "types": [t.name for t in types], "out": [s.value for s in out],
            "launch": vars(launch), "extra": extra.nbSymExprs, "kernel": name,
            "ptx": ptx.decode()}

answers = []
register_quick_plugins("sm_80")
for given in [None, *json.loads(sys.argv[1])]:
    try:
        if given is None:
            register_quick_plugins("sm_80")
        answers.append(drive(*given))
    except EngineError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def _drive(environment: dict[str, str], given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DRIVE, given],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.nvcc
def test_tensorrt_registers_and_describes_the_plugins(bindings: dict[str, str]) -> None:
    given = [
        ("MsDeformAttn", DEFORM, [[-1, 123, 128], [-1, 105, 24], [-1, 105, 12]]),
        ("RelPosAttention", REL_POS, [[-1, 81, 384], [17, 64], [17, 64]]),
        ("MsDeformAttn", DEFORM, [[-1, 122, 128], [-1, 105, 24], [-1, 105, 12]]),
        ("RelPosAttention", REL_POS, [[-1, -1, 384], [17, 64], [17, 64]]),
        ("DepthwiseConvGelu", DEPTHWISE, [[-1, 70, 16], [16, 1, 3, 3], [16]]),
        ("DepthwiseConvGelu", DEPTHWISE, [[-1, 71, 16], [16, 1, 3, 3], [16]]),
        ("WindowedAttention", REL_POS, [[-1, 11, 7, 384], [384], [17, 64], [17, 64]]),
        ("WindowedAttention", REL_POS, [[-1, 11, 7, 384], [128], [17, 64], [17, 64]]),
    ]
    result = _drive(bindings, json.dumps(given))
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    again, first, second, wrong, dynamic, third, ragged, fourth, bias = answers
    assert "already: use the plugin library or the quickly deployable plugins" in again
    assert "value has sizes (122,) behind its attributes' (123,)" in wrong
    assert "x has 71 tokens of 16 channels, expected whole maps of 5x7" in ragged
    assert "qkv_bias has sizes (128,) behind its attributes' (384,)" in bias
    assert "need static shapes but for the batch" in dynamic
    expected = compile_kernel(ms_deform_attn_source("float16", head_dim=64, **DEFORM), "sm_80")
    assert first["fields"] == ["num_heads", "num_points", "level_shapes", "query_shapes"]
    assert first["out"] == [-1, 105, 128]
    x, y = expected.launch.blocks
    assert (first["launch"]["grid_x"], first["launch"]["grid_y"]) == (x, y)
    assert first["launch"]["grid_z"] == -1  # the batch
    assert first["launch"]["block_x"] == expected.launch.threads
    assert first["launch"]["shared_mem"] == expected.launch.shared_bytes
    assert first["ptx"] == expected.ptx.decode()
    expected = compile_kernel(rel_pos_attention_source("float16", **REL_POS), "sm_80")
    assert second["fields"] == ["num_heads", "side", "scale"]
    assert second["out"] == [-1, 81, 128]
    assert second["launch"]["grid_x"] == -expected.launch.blocks[0]  # times the windows
    assert second["launch"]["grid_y"] == second["launch"]["grid_z"] == 1
    expected = compile_kernel(
        depthwise_conv_gelu_source("float16", channels=16, **DEPTHWISE), "sm_80"
    )
    assert third["out"] == [-1, 70, 16]
    assert third["launch"]["grid_x"] == -2 * expected.launch.blocks[0]  # two maps an image
    sizes = {"height": 11, "width": 7, **REL_POS}
    expected = compile_kernel(windowed_attention_source("float16", **sizes), "sm_80")
    assert fourth["fields"] == ["num_heads", "side", "scale"]
    assert fourth["out"] == [-1, 11, 7, 128]
    assert fourth["launch"]["grid_x"] == -expected.launch.blocks[0]
    for answer, inputs in ((first, 3), (second, 3), (third, 3), (fourth, 4)):
        _check_kernel(answer, inputs)


def _check_kernel(answer: dict[str, Any], inputs: int) -> None:
    assert answer["types"] == ["HALF"]
    assert answer["kernel"] == "dbsam_quick"
    # the inputs, then the output
    assert entry_names(answer["ptx"]) == ["dbsam_quick"]
    found = [f"dbsam_quick_param_{i}" in answer["ptx"] for i in range(inputs + 2)]
    assert found == [True] * (inputs + 1) + [False]
    assert ".target sm_80" in answer["ptx"]
    assert answer["launch"]["block_x"] % 32 == 0
    # what a block has on every GPU from sm_80 on
    assert 0 <= answer["launch"]["shared_mem"] <= 99 * 1024
    assert answer["extra"] == 0


def test_registering_without_tensorrt_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match="needs tensorrt, which"):
        quick_plugins.register_quick_plugins()


def test_a_tensorrt_without_the_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tensorrt")
    module.__dict__["__version__"] = "10.3.0"
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", ModuleType("tensorrt.plugin"))
    with pytest.raises(EngineError, match=r"TensorRT 10.3.0 has no ahead-of-time plugins"):
        quick_plugins.register_quick_plugins()


def test_a_plan_with_quick_plugins_is_held_to_the_operators_that_have_one() -> None:
    operators = {"a": "ChannelAttention", "b": "RelPosAttention", "c": "MsDeformAttn"}
    kept = PlacedAttention(operators, softmax=2).of_quick_plugins()
    assert kept == PlacedAttention({"b": "RelPosAttention", "c": "MsDeformAttn"}, softmax=2)


@pytest.mark.parametrize("asked", [True, False])
def test_the_builder_registers_them_for_its_gpu(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[str] = []
    logger = type("Logger", (), {"WARNING": 2, "__init__": lambda self, level: None})
    monkeypatch.setattr(worker, "import_kind", lambda kind: SimpleNamespace(Logger=logger))
    monkeypatch.setattr(worker, "build_plan", lambda *arguments: 7)
    monkeypatch.setattr(worker, "find_gpu", lambda: SimpleNamespace(target="sm_90"))
    monkeypatch.setattr(quick_plugins, "register_quick_plugins", registered.append)
    job = BuildJob("tensorrt", "encoder.onnx", "encoder.plan", flags=Flags(quick_plugins=asked))
    assert worker.build(BuildJob.from_json(job.to_json()))["network_layers"] == 7
    assert registered == (["sm_90"] if asked else [])
