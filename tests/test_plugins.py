"""The TensorRT plugins in a real registry (lean TensorRT, no GPU), and what loading refuses."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dbsam_deploy import fusions, plugins
from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.kernels import plugin_registry
from dbsam_deploy.kernels.plugin_build import PluginLibrary

ROOT = Path(__file__).resolve().parent.parent
ATTRIBUTES = {
    "MsDeformAttn": {
        "num_heads": "INT32",
        "num_points": "INT32",
        "level_shapes": "INT32",
        "query_shapes": "INT32",
    },
    "ChannelAttention": {"epsilon": "FLOAT32"},
    "RelPosAttention": {"num_heads": "INT32", "side": "INT32", "scale": "FLOAT32"},
    "DepthwiseConvGelu": {"height": "INT32", "width": "INT32"},
    "WindowedAttention": {"num_heads": "INT32", "side": "INT32", "scale": "FLOAT32"},
}

CREATE = """
import faulthandler, json, sys
import numpy as np
import tensorrt_lean_bindings as trt
faulthandler.enable()
registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[1]) is not None
kinds = {"i4": np.int32, "i8": np.int64, "f4": np.float32, "f8": np.float64}
types = {"i4": "INT32", "i8": "INT64", "f4": "FLOAT32", "f8": "FLOAT64"}
answers = []
for op, attributes in json.loads(sys.argv[2]):
    # A field only points to its numbers.
    values = [np.array(value, kinds[kind]) for _, kind, value in attributes]
    fields = trt.PluginFieldCollection([
        trt.PluginField(name, value, getattr(trt.PluginFieldType, types[kind]))
        for value, (name, kind, _) in zip(values, attributes)])
    creator = registry.get_creator(op, "1", "dbsam")
    plugin = creator.create_plugin("node", fields, trt.TensorRTPhase.BUILD)
    if plugin is None:
        answers.append(None)
        continue
    core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
    build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
    names = [core.plugin_namespace, core.plugin_name, core.plugin_version]
    answers.append([*names, build.num_outputs])
print(json.dumps(answers))
"""

GOOD = {
    "MsDeformAttn": [
        ("num_heads", "i4", [2]),
        ("num_points", "i4", [4]),
        ("level_shapes", "i4", [4, 5, 2, 3]),
        ("query_shapes", "i4", [3, 5]),
    ],
    "ChannelAttention": [("epsilon", "f4", [1e-6])],
    "RelPosAttention": [("num_heads", "i4", [2]), ("side", "i4", [7]), ("scale", "f4", [0.125])],
    "DepthwiseConvGelu": [("height", "i4", [5]), ("width", "i4", [7])],
    "WindowedAttention": [("num_heads", "i4", [2]), ("side", "i4", [7]), ("scale", "f4", [0.125])],
}
WIDE = {
    op: [(name, kind.replace("4", "8"), value) for name, kind, value in attributes]
    for op, attributes in GOOD.items()
}


def _bad(op: str, expected: str, **changes: Any) -> tuple[str, list[tuple[str, str, Any]], str]:
    """Good attributes with some (name=(kind, value)) changed, added, or left out (None)."""
    fields = {name: (kind, value) for name, kind, value in GOOD[op]} | changes
    return op, [(name, *field) for name, field in fields.items() if field is not None], expected


DEFORM, CHANNEL, REL_POS, DEPTHWISE, WINDOWED = GOOD
BAD = [
    _bad(DEFORM, "attribute num_heads is missing", num_heads=None),
    _bad(DEFORM, "heads is unknown, expected num_heads, num_points", heads=("i4", [2])),
    _bad(DEFORM, "num_points has the value 9, expected 1 to 8", num_points=("i4", [9])),
    _bad(DEFORM, "num_heads has the value 4294967298", num_heads=("i8", [2**32 + 2])),
    _bad(DEFORM, "num_heads is a field of type 1, expected integers", num_heads=("f4", [2.0])),
    _bad(DEFORM, "num_heads has 2 values, expected one", num_heads=("i4", [2, 2])),
    _bad(DEFORM, "has 3 values, expected height and width", level_shapes=("i4", [4, 5, 2])),
    _bad(DEFORM, "level_shapes has 18 values", level_shapes=("i4", [4] * 18)),
    _bad(DEFORM, "query_shapes has the value 0", query_shapes=("i4", [0, 5])),
    _bad(DEFORM, "query_shapes has size 3221225472", query_shapes=("i4", [32768] * 6)),
    _bad(DEFORM, "query_shapes is empty", query_shapes=("i4", [])),
    (DEFORM, [*GOOD[DEFORM], ("num_heads", "i4", [2])], "num_heads is given twice"),
    _bad(CHANNEL, "attribute epsilon is missing", epsilon=None),
    _bad(CHANNEL, "epsilon has the value 0.000000", epsilon=("f4", [0.0])),
    _bad(CHANNEL, "epsilon has the value nan", epsilon=("f4", [float("nan")])),
    _bad(CHANNEL, "epsilon is a field of type 5, expected a number", epsilon=("i4", [1])),
    _bad(REL_POS, "side has the value 65, expected 1 to 64", side=("i4", [65])),
    _bad(REL_POS, "scale has the value inf", scale=("f8", [float("inf")])),
    _bad(DEPTHWISE, "attribute width is missing", width=None),
    _bad(WINDOWED, "side has the value 0, expected 1 to 64", side=("i4", [0])),
    _bad(DEPTHWISE, "height has the value 0, expected 1 to 1048576", height=("i4", [0])),
]
"""Operator, attributes that its creator must refuse, and what the log must say."""


def _need_lean() -> None:
    # Not imported: this process keeps to what the other tests need.
    for name in ("tensorrt_lean_bindings", "tensorrt_lean_libs"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(
                "no lean TensorRT: pip install tensorrt-lean-cu13-bindings tensorrt-lean-cu13-libs"
            )


def _lean(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    _need_lean()
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_registry_creates_the_plugins_and_refuses_bad_attributes(
    plugin_library: PluginLibrary,
) -> None:
    given = [*GOOD.items(), *WIDE.items(), *((op, fields) for op, fields, _ in BAD)]
    result = _lean(CREATE, plugin_library.path, json.dumps(given))
    assert result.returncode == 0, result.stderr
    made = [["dbsam", op, "1", outputs] for op, outputs in zip(GOOD, (1, 2, 1, 1, 1), strict=True)]
    assert json.loads(result.stdout) == [*made, *made, *(None for _ in BAD)]
    logged = [line for line in result.stderr.splitlines() if "dbsam::" in line]
    assert len(logged) == len(BAD), result.stderr
    for (op, _, expected), line in zip(BAD, logged, strict=True):
        assert f"dbsam::{op}: " in line
        assert expected in line


def test_info_shows_what_a_registry_finds(
    plugin_library: PluginLibrary, capsys: pytest.CaptureFixture[str]
) -> None:
    _need_lean()
    assert plugins.main(["info", str(plugin_library.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(plugin_library.sha256)
    assert re.match(r"loaded by tensorrt\w* \d+\.\d+", lines[2])
    shown = plugin_registry.list_creators(plugin_library.path)["creators"]
    assert {c["name"]: c["attributes"] for c in shown} == ATTRIBUTES
    assert {(c["namespace"], c["version"]) for c in shown} == {("dbsam", "1")}
    for line, operator in zip(lines[3:], ATTRIBUTES, strict=True):
        assert re.match(rf"  dbsam::{operator} +version 1   \w+ (INT32|FLOAT32)", line)


def test_info_of_a_broken_library_says_why(plugin_library: PluginLibrary, tmp_path: Path) -> None:
    _need_lean()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not ELF" + plugin_library.path.read_bytes())
    with pytest.raises(EngineError, match=r"cannot load .*broken.so: .*invalid ELF header"):
        plugin_registry.list_creators(broken)


LOAD = """
import importlib, pathlib, sys
from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.kernels.plugin_registry import load_plugins
runtime = importlib.import_module("tensorrt_lean_bindings")
if sys.argv[2]:
    runtime.__version__ = sys.argv[2]
path = pathlib.Path(sys.argv[1])
try:
    print(load_plugins(path, runtime=runtime) == load_plugins(path, runtime=runtime))
except EngineError as error:
    print(error)
    raise SystemExit(2)
print(len([c for c in runtime.get_plugin_registry().all_creators if c.plugin_namespace == "dbsam"]))
"""


def test_loading_twice_registers_once(plugin_library: PluginLibrary) -> None:
    result = _lean(LOAD, plugin_library.path, plugin_library.tensorrt_headers)
    assert result.stdout == "True\n5\n", result.stderr


def test_a_library_of_another_major_version_is_refused(plugin_library: PluginLibrary) -> None:
    result = _lean(LOAD, plugin_library.path, "99.1.0")
    assert result.returncode == 2, result.stderr
    assert (
        f"compiled with headers of TensorRT {plugin_library.tensorrt_headers}, this is"
        in result.stdout
    )
    assert "dbsam_deploy.plugins build --tensorrt 99.1`" in result.stdout


def test_the_fused_nodes_have_what_the_plugins_ask_for() -> None:
    # The parser hands over the attributes that a creator names, and takes the inputs in order.
    bodies = {op.NAME: op.body() for op in fusions._OPS.values()}
    assert set(bodies) == set(plugin_registry.OPERATORS) == set(ATTRIBUTES)
    inputs = {name: len(body.inputs) for name, body in bodies.items()}
    assert inputs == dict(zip(ATTRIBUTES, (3, 7, 3, 3, 4), strict=True))
    for name, body in bodies.items():
        assert set(ATTRIBUTES[name]) <= set(body.attributes)
        assert {"plugin_namespace", "plugin_version"} <= set(body.attributes)


# --- loading, with a registry of our own


class _Registry:
    """A registry whose `load_library` gives the creators in `offers`."""

    def __init__(self, offers: tuple[str, ...], there: tuple[str, ...] = ()) -> None:
        self.offers, self.there = offers, there

    def load_library(self, path: str) -> object:
        self.there += self.offers
        return object()

    def get_creator(self, name: str, version: str, namespace: str) -> str | None:
        return name if (version, namespace) == ("1", "dbsam") and name in self.there else None


def _runtime(registry: _Registry) -> ModuleType:
    module = ModuleType("tensorrt")
    module.__dict__.update(__version__="10.16.1", get_plugin_registry=lambda: registry)
    return module


def test_a_library_must_have_all_plugins(tmp_path: Path) -> None:
    runtime = _runtime(_Registry(("MsDeformAttn", "RelPosAttention")))
    with pytest.raises(EngineError, match="has no plugin dbsam::ChannelAttention of version 1"):
        plugin_registry.register_library(tmp_path / "x.so", "0" * 64, runtime)


def test_plugins_of_somebody_else_are_not_taken_for_ours(tmp_path: Path) -> None:
    runtime = _runtime(_Registry(plugin_registry.OPERATORS, there=("RelPosAttention",)))
    with pytest.raises(EngineError, match="other plugins named dbsam::RelPosAttention"):
        plugin_registry.register_library(tmp_path / "x.so", "0" * 64, runtime)


def test_loading_without_tensorrt_says_what_to_install(
    plugin_library: PluginLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match="needs tensorrt, which"):
        plugin_registry.load_plugins(plugin_library.path)
