"""The entry points on NVRTC's kernels: what they refuse, and what they ask of a (played) driver."""

import ctypes
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.kernels import library as kernels
from dbsam_deploy.kernels import nvrtc_kernels, toolkit, torch_ops
from dbsam_deploy.kernels.nvrtc import find_nvrtc
from dbsam_deploy.kernels.nvrtc_kernels import NvrtcKernels

ADDRESS = 4096
DEFORM = (2, 2, 64, 1, 4, [16, 16], 1, [16, 16], 1)
"""batch, heads, head_dim, levels, points, level_shapes, query_levels, query_shapes, dtype"""
REL_POS = (5, 14, 2, 64, 0.125, 1)
"""windows, side, heads, head_dim, scale, dtype"""
DEPTHWISE = (3, 9, 35, 72, 1)
"""images, height, width, channels, dtype"""
WINDOWED = (3, 9, 20, 14, 2, 64, 0.125, 1)
"""batch, height, width, side, heads, head_dim, scale, dtype"""
CHANNEL = (2, 9, 11, 40, 6, 1e-6, 1)
"""batch, height, width, channels, reduced, epsilon, dtype"""


def changed(good: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*good[:index], value, *good[index + 1 :])


REFUSED = {
    "ms_deform_attn": [
        *(changed(DEFORM, i, v) for i, v in ((0, -1), (1, 0), (2, 12), (2, 264), (3, 0), (3, 9))),
        *(changed(DEFORM, i, v) for i, v in ((4, 0), (4, 9), (5, [3, 0]), (5, [65536, 32767]))),
        *(changed(DEFORM, i, v) for i, v in ((6, 0), (6, 9), (7, [-3, 2]), (8, 3), (8, -1))),
    ],
    "rel_pos_attention": [
        *(changed(REL_POS, i, v) for i, v in ((0, -1), (1, 0), (1, 65), (2, 0), (2, 1025))),
        *(changed(REL_POS, i, v) for i, v in ((3, 32), (4, 0.0), (4, float("inf")), (5, 3))),
    ],
    "channel_attention": [
        *(changed(CHANNEL, i, v) for i, v in ((0, 0), (0, 65536), (1, 0), (2, 0), (3, 4))),
        *(changed(CHANNEL, i, v) for i, v in ((3, 44), (3, 1032), (4, 0), (6, 3))),
    ],
    "depthwise_conv_gelu": [
        *(changed(DEPTHWISE, i, v) for i, v in ((0, -1), (1, 0), (2, -2), (3, 0), (3, 12))),
        *(changed(DEPTHWISE, i, v) for i, v in ((1, 2**31 - 1), (3, 2**31 - 8), (4, 3))),
    ],
    "windowed_attention": [
        *(changed(WINDOWED, i, v) for i, v in ((0, -1), (1, 0), (2, -2), (3, 0), (3, 65), (4, 0))),
        *(changed(WINDOWED, i, v) for i, v in ((4, 1025), (5, 32), (6, 0.0), (7, 3), (7, -1))),
        *(changed(WINDOWED, i, v) for i, v in ((1, 2**31 - 1), (2, 2**31 - 1), (2, 243_140))),
    ],
}
TENSORS = {"ms_deform_attn": 4, "rel_pos_attention": 4, "channel_attention": 10}
TENSORS |= {"depthwise_conv_gelu": 4, "windowed_attention": 5}
TAKEN = {"ms_deform_attn": DEFORM, "rel_pos_attention": REL_POS, "channel_attention": CHANNEL}
TAKEN |= {"depthwise_conv_gelu": DEPTHWISE, "windowed_attention": WINDOWED}


@pytest.mark.parametrize("operator", REFUSED)
def test_it_refuses_what_the_library_refuses(operator: str) -> None:
    refuse = {
        "ms_deform_attn": nvrtc_kernels.refuse_deform,
        "rel_pos_attention": nvrtc_kernels.refuse_rel_pos,
        "channel_attention": nvrtc_kernels.refuse_channel,
        "depthwise_conv_gelu": nvrtc_kernels.refuse_depthwise,
        "windowed_attention": nvrtc_kernels.refuse_windowed,
    }[operator]
    library, entry = kernels.host_library(operator), f"dbsam_{operator}"
    good = (*[ADDRESS] * TENSORS[operator], *TAKEN[operator], None)
    assert refuse(good) == 0
    misaligned = [changed(good, i, wrong) for i in range(TENSORS[operator]) for wrong in (0, 8)]
    wrong = [(*[ADDRESS] * TENSORS[operator], *given, None) for given in REFUSED[operator]]
    for arguments in (*wrong, *misaligned):
        status = refuse(arguments)
        assert status < 0, arguments
        with pytest.raises(EngineError, match=rf"\(status {status}\)"):
            kernels.call(library, entry, *arguments)


class PlayedDriver:
    """The driver's functions that launch kernels; `fails` makes one of them answer an error."""

    def __init__(self, **fails: int) -> None:
        self.fails, self.names, self.modules = fails, [], []
        self.shared: dict[int, int] = {}
        self.launched: list[dict[str, Any]] = []

    def cuModuleLoadData(self, module: Any, cubin: bytes) -> int:  # noqa: N802
        self.modules.append(cubin)
        module._obj.value = len(self.modules)
        return self.fails.get("load", 0)

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:  # noqa: N802
        self.names.append(name.decode())
        function._obj.value = len(self.names)
        return self.fails.get("function", 0)

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: Any) -> int:  # noqa: N802
        assert attribute == 8
        self.shared[function.value] = value.value
        return self.fails.get("shared", 0)

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:  # noqa: N802
        *sizes, stream, parameters, extra = rest
        assert extra is None
        self.launched.append(
            {
                "name": self.names[function.value - 1],
                "grid": tuple(size.value for size in sizes[:3]),
                "threads": sizes[3].value,
                "shared": sizes[6].value,
                "stream": stream.value,
                "first": ctypes.cast(parameters[0], ctypes.POINTER(ctypes.c_void_p))[0],
                "count": len(parameters),
                "last": parameters[len(parameters) - 1],
            }
        )
        return self.fails.get("launch", 0)


def made(driver: PlayedDriver, folder: Path) -> NvrtcKernels:
    return NvrtcKernels("sm_90", folder, load=lambda name: driver)


def call(library: NvrtcKernels, operator: str, *, stream: int | None = 77) -> None:
    addresses = [ADDRESS * (i + 1) for i in range(TENSORS[operator])]
    kernels.call(library, f"dbsam_{operator}", *addresses, *TAKEN[operator], stream)


@pytest.mark.nvrtc
def test_each_call_launches_its_kernels_over_the_whole_problem(tmp_path: Path) -> None:
    driver = PlayedDriver()
    library = made(driver, tmp_path)
    call(library, "ms_deform_attn")
    call(library, "rel_pos_attention")
    call(library, "channel_attention")
    call(library, "depthwise_conv_gelu")
    call(library, "windowed_attention")
    deform, rel_pos, *channel, depthwise, windowed = driver.launched
    assert (deform["grid"], deform["threads"], deform["count"]) == ((2, 4, 2), 256, 4)
    assert (rel_pos["grid"], rel_pos["count"]) == ((2 * 2 * 5, 1, 1), 4)
    # two groups of channels, two tiles across, three strips of four rows at most, for each image
    assert (depthwise["grid"], depthwise["threads"]) == ((2 * 2 * 3 * 3, 1, 1), 128)
    assert (depthwise["count"], depthwise["shared"]) == (4, 0)
    # two heads of one window down and two across, in one tile, for each image
    assert (windowed["grid"], windowed["count"]) == ((2 * 1 * 2 * 1 * 3, 1, 1), 5)
    assert [one["name"] for one in channel] == [f"dbsam_quick_{i}" for i in range(4)]
    assert [one["grid"] for one in channel] == [(2 * 2 * 3, 1, 1), (2, 2, 1), (2, 2, 1), (10, 2, 1)]
    for one in driver.launched:
        assert (one["stream"], one["first"]) == (77, ADDRESS)
    asked = {i: one["shared"] for i, one in enumerate(driver.launched, 1) if one["shared"]}
    assert driver.shared == asked
    assert [*asked] == [1, 2, 3, 8]
    # the addresses of channel attention are one structure, its epsilon behind them
    tensors = ctypes.cast(channel[0]["last"], ctypes.POINTER(nvrtc_kernels._Tensors)).contents
    assert list(tensors.addresses) == [ADDRESS * (i + 1) for i in range(10)]
    assert tensors.epsilon == pytest.approx(1e-6)


@pytest.mark.nvrtc
def test_what_was_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = PlayedDriver(), PlayedDriver()
    library = made(first, tmp_path)
    call(library, "rel_pos_attention")
    call(library, "rel_pos_attention")
    assert len(first.modules) == 1
    monkeypatch.setattr(nvrtc_kernels, "compile_source", None)  # a call of it would fail
    call(made(second, tmp_path), "rel_pos_attention")
    assert second.modules == first.modules
    assert second.launched == [{**first.launched[0], "last": second.launched[0]["last"]}]


@pytest.mark.nvrtc
def test_the_workspace_is_the_librarys(tmp_path: Path) -> None:
    *sizes, _, dtype = CHANNEL
    ours = made(PlayedDriver(), tmp_path).dbsam_channel_attention_workspace
    theirs = kernels.host_library("channel_attention").dbsam_channel_attention_workspace
    assert ours(*sizes, dtype) == theirs(*sizes, dtype) > 0
    assert ours(0, *sizes[1:], dtype) == theirs(0, *sizes[1:], dtype) == 0


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ({"load": 209}, r"CUDA error 209 \(cudaErrorNoKernelImageForDevice"),
        ({"function": 500}, r"CUDA error 500 \(cudaErrorSymbolNotFound"),
        ({"shared": 1}, r"\(status -4\): it needs more shared memory"),
        ({"launch": 700}, r"CUDA error 700 \(cudaErrorIllegalAddress"),
    ],
)
def test_the_drivers_errors_are_the_entry_points(
    fails: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=message):
        call(made(PlayedDriver(**fails), tmp_path), "rel_pos_attention")


@pytest.mark.nvrtc
def test_it_is_chosen_where_there_is_no_nvcc_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nowhere() -> Path:
        raise EngineError("no nvcc")

    monkeypatch.setattr(toolkit, "find_nvcc", nowhere)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        torch_ops, "NvrtcKernels", lambda target: NvrtcKernels(target, load=lambda name: None)
    )
    torch_ops.kernel_library.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "dbsam_deploy"):
            library = torch_ops.kernel_library(torch.device("cuda", 7))
    finally:
        torch_ops.kernel_library.cache_clear()
    assert isinstance(library, NvrtcKernels)
    version = re.escape(find_nvrtc().version)
    assert re.search(rf"no nvcc is here: NVRTC {version} .* for sm_90", caplog.text)


def test_it_has_every_entry_point_that_pytorchs_operators_call() -> None:
    called = set(re.findall(r"\bdbsam_\w+", Path(torch_ops.__file__).read_text()))
    assert "dbsam_channel_attention_workspace" in called
    assert called <= set(dir(NvrtcKernels))
