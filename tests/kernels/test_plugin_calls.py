"""The plugins driven as TensorRT drives them: shapes, formats, storing, and values of `enqueue`.

`plugins_probe.cpp` plays TensorRT; the kernels run on the CPU emulation.
"""

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.references import check_close

from dbsam_deploy.kernels import torch_ops
from dbsam_deploy.kernels.headers import Headers
from dbsam_deploy.kernels.library import OPERATORS, host_library
from dbsam_deploy.kernels.plugin_build import PluginLibrary
from dbsam_deploy.kernels.toolkit import find_nvcc

FLOAT, HALF, INT8, BF16 = 0, 1, 2, 7  # nvinfer1::DataType
LINEAR, CHW2 = 0, 1  # nvinfer1::TensorFormat
INT32, FLOAT32 = 5, 1  # nvinfer1::PluginFieldType
DTYPES = {FLOAT: torch.float32, HALF: torch.float16, BF16: torch.bfloat16}
BOUND = (
    "dbsam_ms_deform_attn",
    "dbsam_channel_attention",
    "dbsam_channel_attention_workspace",
    "dbsam_rel_pos_attention",
    "dbsam_depthwise_conv_gelu",
    "dbsam_windowed_attention",
)


class _Field(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("count", ctypes.c_int32),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * 8),
        ("most", ctypes.c_int64 * 8),
        ("rank", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
    )


Shape = tuple[int, ...]


def _tensors(
    shapes: tuple[Shape, ...], dtype: int = FLOAT, *, most: int = 3, data: Any = ()
) -> ctypes.Array[_Tensor]:
    """Descriptions of tensors; `most` is the upper bound of a batch of -1."""
    made = (_Tensor * len(shapes))()
    for index, shape in enumerate(shapes):
        made[index].sizes[: len(shape)] = shape
        made[index].most[: len(shape)] = [most if size < 0 else size for size in shape]
        made[index].rank, made[index].type, made[index].format = len(shape), dtype, LINEAR
        if data:
            made[index].data = data[index].data_ptr()
    return made


@dataclass(frozen=True)
class _Case:
    """An operator with small attributes, its shapes for a batch B, and its reference."""

    op: str
    attributes: dict[str, list[int] | float]
    inputs: Callable[[int], tuple[Shape, ...]]
    outputs: Callable[[int], tuple[Shape, ...]]
    reference: Callable[..., Any]
    metadata: str

    def __str__(self) -> str:
        return self.op


CASES = (
    _Case(
        "MsDeformAttn",
        {"num_heads": [2], "num_points": [3], "level_shapes": [4, 5, 2, 3], "query_shapes": [3, 5]},
        lambda b: ((b, 26, 16), (b, 15, 2 * 2 * 3 * 2), (b, 15, 2 * 2 * 3)),
        lambda b: ((b, 15, 16),),
        lambda *x: (
            torch_ops.ms_deform_attn_reference(
                *x, num_heads=2, num_points=3, level_shapes=(4, 5, 2, 3), query_shapes=(3, 5)
            ),
        ),
        "num_heads=2 num_points=3 level_shapes=4,5,2,3 query_shapes=3,5",
    ),
    _Case(
        "ChannelAttention",
        {"epsilon": 1e-5},
        lambda b: ((b, 3, 5, 16), (16,), (16,), (16, 1, 3, 3), (4, 16), (16, 4), (16, 16)),
        lambda b: ((b, 15, 16), (b, 16, 16)),
        lambda *x: torch_ops.channel_attention_reference(*x, epsilon=1e-5),
        "epsilon=9.99999975e-06",
    ),
    _Case(
        "RelPosAttention",
        {"num_heads": [2], "side": [3], "scale": 0.125},
        lambda b: ((b, 9, 3 * 2 * 64), (5, 64), (5, 64)),
        lambda b: ((b, 9, 2 * 64),),
        lambda *x: (torch_ops.rel_pos_attention_reference(*x, num_heads=2, side=3, scale=0.125),),
        "num_heads=2 side=3 scale=0.125",
    ),
    _Case(
        "DepthwiseConvGelu",
        {"height": [3], "width": [5]},
        lambda b: ((b, 2 * 15, 16), (16, 1, 3, 3), (16,)),
        lambda b: ((b, 2 * 15, 16),),
        lambda *x: (torch_ops.depthwise_conv_gelu_reference(*x, height=3, width=5),),
        "height=3 width=5",
    ),
    _Case(
        "WindowedAttention",
        {"num_heads": [2], "side": [3], "scale": 0.125},
        lambda b: ((b, 4, 5, 3 * 2 * 64), (3 * 2 * 64,), (5, 64), (5, 64)),
        lambda b: ((b, 4, 5, 2 * 64),),
        lambda *x: (torch_ops.windowed_attention_reference(*x, num_heads=2, side=3, scale=0.125),),
        "num_heads=2 side=3 scale=0.125",
    ),
)


class _Probe:
    """The probe's functions; `log` is what the plugins logged since it was last asked."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name in ("create", "revive", "clone", "attach"):
            getattr(self.library, f"probe_{name}").restype = ctypes.c_void_p
        for name in ("log", "describe"):
            getattr(self.library, f"probe_{name}").restype = ctypes.c_char_p
        self.library.probe_workspace.restype = ctypes.c_size_t
        self.headers_major = self.library.probe_headers_major()

    def __call__(self, name: str, *arguments: Any) -> Any:
        return getattr(self.library, f"probe_{name}")(*arguments)

    def log(self) -> str:
        return self("log").decode()

    def create(self, op: str, attributes: dict[str, list[int] | float]) -> "_Plugin | None":
        fields = (_Field * len(attributes))()
        values = []  # kept alive until the plugin has read them
        for field, (name, value) in zip(fields, attributes.items(), strict=True):
            whole = isinstance(value, list)
            numbers = value if whole else [value]
            values.append(((ctypes.c_int32 if whole else ctypes.c_float) * len(numbers))(*numbers))
            field.name, field.count = name.encode(), len(numbers)
            field.type = INT32 if whole else FLOAT32
            field.data = ctypes.cast(values[-1], ctypes.c_void_p)
        address = self("create", op.encode(), fields, len(fields))
        return None if address is None else _Plugin(self, address)


class _Plugin:
    """One plugin object."""

    def __init__(self, probe: _Probe, address: int) -> None:
        self.probe, self.address = probe, ctypes.c_void_p(address)

    def __call__(self, name: str, *arguments: Any) -> Any:
        return self.probe(name, self.address, *arguments)

    def with_tensors(self, name: str, given: Any, made: Any, *more: Any) -> int:
        return self(name, given, len(given), made, len(made), *more)

    @property
    def description(self) -> str:
        return self("describe").decode()


@pytest.fixture(scope="session")
def probe(
    plugin_library: PluginLibrary,
    tensorrt_headers: Headers,
    tmp_path_factory: pytest.TempPathFactory,
) -> _Probe:
    """The compiled plugins with `plugins_probe.cpp`, their kernels on the CPU emulation."""
    folder = next(plugin_library.path.parent.glob("cmake-*"))
    objects = sorted((folder / "CMakeFiles" / "dbsam_plugin_objects.dir").rglob("*.o"))
    path = tmp_path_factory.mktemp("probe") / "probe.so"
    source = Path(__file__).parent / "plugins_probe.cpp"
    # nvcc only passes C++ on, but knows where CUDA's headers are.
    command = [str(find_nvcc()), "-std=c++17", "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror", "-shared"]
    command += ["-isystem", str(tensorrt_headers.folder), "-Xlinker=--no-undefined"]
    command += [str(source), *map(str, objects), "-o", str(path)]
    subprocess.run(command, check=True)
    made = _Probe(path)
    operator_of = {e.name: o for o, spec in OPERATORS.items() for e in spec.entry_points}
    for index, name in enumerate(BOUND):
        function = getattr(host_library(operator_of[name]), name)
        made("bind", index, ctypes.cast(function, ctypes.c_void_p))
    return made


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest, probe: _Probe) -> _Case:
    probe("start", probe.headers_major)
    probe.log()
    return request.param


@pytest.fixture
def plugin(case: _Case, probe: _Probe) -> _Plugin:
    made = probe.create(case.op, case.attributes)
    assert made is not None, probe.log()
    return made


def test_attributes_survive_storing_and_copying(plugin: _Plugin, case: _Case) -> None:
    assert plugin.description == f"dbsam::{case.op} 1: {case.metadata}"
    revived = _Plugin(plugin.probe, plugin("revive"))
    copies = [_Plugin(plugin.probe, revived(name)) for name in ("clone", "attach")]
    revived("delete")
    for copy in copies:
        assert copy.description == plugin.description
        assert copy("outputs") == len(case.outputs(1))


def test_shapes_are_inferred_with_a_dynamic_batch(plugin: _Plugin, case: _Case) -> None:
    for batch in (-1, 2):
        given = _tensors(case.inputs(batch))
        made = (_Tensor * len(case.outputs(1)))()
        assert plugin.with_tensors("infer", given, made) == 0, plugin.probe.log()
        assert tuple(tuple(t.sizes[: t.rank]) for t in made) == case.outputs(batch)


def test_all_tensors_have_one_dtype_and_the_linear_format(plugin: _Plugin, case: _Case) -> None:
    inputs, outputs = len(case.inputs(1)), len(case.outputs(1))
    shapes = (*case.inputs(-1), *case.outputs(-1))

    def supported(position: int, tensors: ctypes.Array[_Tensor]) -> bool:
        return bool(plugin("supports", position, tensors, inputs, outputs))

    for dtype in DTYPES:
        assert all(supported(i, _tensors(shapes, dtype)) for i in range(len(shapes)))
        for position in range(len(shapes)):
            odd = _tensors(shapes, dtype)
            odd[position].format = CHW2
            assert not supported(position, odd)
            odd = _tensors(shapes, dtype)
            odd[position].type = INT8
            assert not supported(position, odd)
            odd[position].type = HALF if dtype == FLOAT else FLOAT
            assert supported(position, odd) == (position == 0)
    assert plugin.probe.log() == ""
    wrong = _tensors(((7, *shapes[0][1:-1], 7), *shapes[1:]))
    assert not supported(inputs - 1, wrong)
    assert plugin.probe.log().startswith(f"1 dbsam::{case.op}: ")
    assert not plugin("supports", 0, _tensors(shapes), inputs + 1, outputs)
    assert f"{inputs + 1} inputs, expected {inputs}" in plugin.probe.log()


def test_outputs_have_the_dtype_of_the_inputs(plugin: _Plugin, case: _Case) -> None:
    inputs, outputs = len(case.inputs(1)), len(case.outputs(1))
    found = (ctypes.c_int32 * outputs)()
    for dtype in DTYPES:
        given = (ctypes.c_int32 * inputs)(*[dtype] * inputs)
        assert plugin("types", given, inputs, found, outputs) == 0
        assert list(found) == [dtype] * outputs
        given[inputs - 1] = INT8
        assert plugin("types", given, inputs, found, outputs) != 0
        assert f"input {inputs - 1} has data type 2" in plugin.probe.log()


def test_what_fits_is_configured(plugin: _Plugin, case: _Case) -> None:
    given, made = _tensors(case.inputs(-1)), _tensors(case.outputs(-1))
    assert plugin.with_tensors("configure", given, made) == 0, plugin.probe.log()
    given, made = _tensors(case.inputs(2), BF16), _tensors(case.outputs(2), BF16)
    assert plugin.with_tensors("shape_change", given, made) == 0, plugin.probe.log()


def test_every_wrong_shape_is_refused(plugin: _Plugin, case: _Case) -> None:
    inputs, outputs = case.inputs(2), case.outputs(2)
    tried = 0
    for index, shape in enumerate((*inputs, *outputs)):
        for axis in range(len(shape)):
            all_shapes = [*inputs, *outputs]
            all_shapes[index] = (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :])
            if (case.op, index, axis) == ("ChannelAttention", 0, 0):
                continue  # any batch fits its inputs, and the outputs are wrong in their own turn
            given = _tensors(tuple(all_shapes[: len(inputs)]))
            made = _tensors(tuple(all_shapes[len(inputs) :]))
            for name in ("configure", "shape_change"):
                assert plugin.with_tensors(name, given, made) != 0, (name, all_shapes)
                log = plugin.probe.log()
                assert log.startswith(f"1 dbsam::{case.op}: "), log
                assert log.count("\n") == 1
            tried += 1
    assert tried > len(inputs)


def test_a_dynamic_map_is_refused(plugin: _Plugin, case: _Case) -> None:
    first, *others = case.inputs(-1)
    given = _tensors(((*first[:1], -1, *first[2:]), *others))
    assert plugin.with_tensors("infer", given, (_Tensor * len(case.outputs(1)))()) != 0
    assert "only the first (the batch) is dynamic" in plugin.probe.log()
    given = _tensors(((-1,) * 6, *others))
    assert plugin.with_tensors("infer", given, (_Tensor * len(case.outputs(1)))()) != 0
    assert "a tensor with 6 axes" in plugin.probe.log()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(DTYPES[d]).removeprefix("torch."))
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_enqueue_computes_the_operator(
    plugin: _Plugin, case: _Case, dtype: int, batch: int
) -> None:
    torch_dtype = DTYPES[dtype]
    generator = torch.Generator().manual_seed(batch)
    given = [torch.randn(s, generator=generator).to(torch_dtype) for s in case.inputs(batch)]
    made = [torch.full(s, torch.nan, dtype=torch_dtype) for s in case.outputs(batch)]
    inputs = _tensors(case.inputs(batch), dtype, data=given)
    outputs = _tensors(case.outputs(batch), dtype, data=made)
    # Room for the largest batch of the profile must do for every smaller one.
    room = plugin.with_tensors(
        "workspace", _tensors(case.inputs(-1), dtype), _tensors(case.outputs(-1), dtype)
    )
    workspace = torch.full((room // 4 + 4,), torch.nan) if room else None
    address = ctypes.c_void_p(None if workspace is None else workspace.data_ptr())
    assert plugin.with_tensors("enqueue", inputs, outputs, address) == 0, plugin.probe.log()
    if batch == 0:
        return
    name = str(torch_dtype).removeprefix("torch.")
    expected = case.reference(*(x.float() for x in given))
    for index, (found, wanted) in enumerate(zip(made, expected, strict=True)):
        check_close(found.float().numpy(), wanted.numpy(), name, f"output {index}")
    if workspace is not None:
        assert workspace[room // 4 :].isnan().all()


def test_the_kernels_refusal_is_logged(plugin: _Plugin, case: _Case) -> None:
    given = [torch.zeros(s) for s in case.inputs(1)]
    made = [torch.zeros(s) for s in case.outputs(1)]
    inputs, outputs = (
        _tensors(case.inputs(1), data=given),
        _tensors(case.outputs(1), data=made),
    )
    inputs[0].data += 4  # no multiple of 16 bytes
    workspace = torch.zeros(1 << 16)
    address = ctypes.c_void_p(workspace.data_ptr())
    assert plugin.with_tensors("enqueue", inputs, outputs, address) == -3
    assert "the kernel refused its arguments: code -3" in plugin.probe.log()


def test_a_missing_workspace_is_refused(probe: _Probe) -> None:
    case = CASES[1]
    plugin = probe.create(case.op, case.attributes)
    assert plugin is not None
    inputs, outputs = _tensors(case.inputs(1)), _tensors(case.outputs(1))
    probe.log()
    assert plugin.with_tensors("enqueue", inputs, outputs, None) != 0
    assert "TensorRT gave no workspace" in probe.log()
    unbounded = _tensors(case.inputs(-1), most=-1)
    assert plugin.with_tensors("workspace", unbounded, outputs) == 0
    assert "expected an upper bound of the batch" in probe.log()


@pytest.mark.parametrize("difference", ["none", "another major version"])
def test_no_logger_of_another_tensorrt_is_called(
    difference: str, probe: _Probe, capfd: pytest.CaptureFixture[str]
) -> None:
    probe.log()
    probe("start", 0 if difference == "none" else probe.headers_major + 1)
    assert probe.create("RelPosAttention", {"num_heads": [2]}) is None
    assert capfd.readouterr().err == (
        "[dbsam] error: dbsam::RelPosAttention: attribute side is missing\n"
    )
    assert probe.log() == ""
    probe("start", probe.headers_major)
    assert probe.create("RelPosAttention", {"num_heads": [2]}) is None
    assert probe.log() == "1 dbsam::RelPosAttention: attribute side is missing\n"
    assert capfd.readouterr().err == ""
