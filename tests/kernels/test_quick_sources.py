"""The sources for one shape on the CPU emulation, and how their launches are read."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from support.references import check_close

from dbsam_deploy.core.errors import EngineError
from dbsam_deploy.kernels import torch_ops
from dbsam_deploy.kernels.build import build_library
from dbsam_deploy.kernels.library import DTYPE_CODES, host_library
from dbsam_deploy.kernels.quick_sources import (
    QuickLaunch,
    channel_attention_source,
    depthwise_conv_gelu_source,
    ms_deform_attn_source,
    read_launches,
    rel_pos_attention_source,
    windowed_attention_source,
)

DEFORM: dict[str, Any] = {
    "num_heads": 2,
    "num_points": 3,
    "level_shapes": [9, 13, 2, 3],
    "query_shapes": [3, 5, 10, 9],
}
REL_POS: dict[str, Any] = {"num_heads": 2, "side": 9, "scale": 0.125}
CHANNEL = {"batch": 2, "height": 9, "width": 11, "channels": 40, "reduced": 6}
RUN = """
extern "C" int run(const void* first, const void* second, const void* third, void* out, int batch) {
  return DBSAM_LAUNCH(dbsam_quick, GRID, dim3(kLaunch.threads), kLaunch.shared_bytes, nullptr,
                      static_cast<const T*>(first), static_cast<const T*>(second),
                      static_cast<const T*>(third), static_cast<T*>(out));
}
"""


RUN_ALL = """
extern "C" int run(Tensors* tensors, float epsilon, unsigned long long* floats) {
  *floats = kFloats;
  if (tensors == nullptr) return 0;
  tensors->epsilon = epsilon;
#define DBSAM_RUN(i) \\
  if (const int status = DBSAM_LAUNCH(dbsam_quick_##i, dim3(kLaunch<i>.x, kLaunch<i>.y), \\
                                      dim3(kLaunch<i>.threads), kLaunch<i>.shared_bytes, nullptr, \\
                                      *tensors)) return status;
  DBSAM_RUN(0) DBSAM_RUN(1) DBSAM_RUN(2) DBSAM_RUN(3)
  return 0;
}
"""


def _run_on_cpu(source: str, grid: str, folder: Path, tensors: list[torch.Tensor]) -> None:
    """Launch a quick kernel on the emulation; the last tensor is the output."""
    library = _build(source + RUN.replace("GRID", grid), folder)
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    assert library.run(*addresses, tensors[0].shape[0]) == 0


def _build(source: str, folder: Path) -> ctypes.CDLL:
    path = folder / "quick.cu"
    path.write_text(source)
    flags = ("-std=c++17", "-O1", "-x", "c++", "-DDBSAM_HOST", "-fPIC", "-shared", "-pthread")
    flags += ("-fno-gnu-unique", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    return ctypes.CDLL(str(build_library("quick", "g++", (path,), flags, None)))


@pytest.mark.parametrize("element", ["float32", "float16"])
def test_the_deformable_kernel_computes_the_operator(element: str, tmp_path: Path) -> None:
    dtype = getattr(torch, element)
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 123, 48), (2, 105, 24), (2, 105, 12))
    given = [torch.randn(s, generator=generator).to(dtype) for s in sizes]
    out = torch.full((2, 105, 48), torch.nan, dtype=dtype)
    source = ms_deform_attn_source(element, head_dim=24, **DEFORM)
    _run_on_cpu(source, "dim3(kLaunch.x, kLaunch.y, batch)", tmp_path, [*given, out])
    expected = torch_ops.ms_deform_attn_reference(*(x.float() for x in given), **DEFORM)
    check_close(out.float().numpy(), expected.numpy(), element)


@pytest.mark.parametrize("element", ["float32", "float16"])
def test_the_attention_kernel_computes_the_operator(element: str, tmp_path: Path) -> None:
    dtype = getattr(torch, element)
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 81, 384), (17, 64), (17, 64))
    given = [torch.randn(s, generator=generator).to(dtype) for s in sizes]
    out = torch.full((3, 81, 128), torch.nan, dtype=dtype)
    source = rel_pos_attention_source(element, **REL_POS)
    _run_on_cpu(source, "dim3(kLaunch.x * batch)", tmp_path, [*given, out])
    expected = torch_ops.rel_pos_attention_reference(*(x.float() for x in given), **REL_POS)
    check_close(out.float().numpy(), expected.numpy(), element)


@pytest.mark.slow  # optional, and nvcc compiles it in every run, for the quick plugins
def test_the_depthwise_kernel_computes_the_operator(tmp_path: Path) -> None:
    given = [torch.randn(shape).half() for shape in ((3, 5 * 7, 24), (24, 1, 3, 3), (24,))]
    out = torch.full(given[0].shape, torch.nan, dtype=torch.float16)
    source = depthwise_conv_gelu_source("float16", height=5, width=7, channels=24)
    _run_on_cpu(source, "dim3(kLaunch.x * batch)", tmp_path, [*given, out])
    wide = (x.float() for x in given)
    expected = torch_ops.depthwise_conv_gelu_reference(*wide, height=5, width=7)
    check_close(out.float().numpy(), expected.numpy(), "float16 kernel")


@pytest.mark.slow  # optional, and NVRTC compiles it in every run
def test_the_windowed_kernel_computes_the_operator(tmp_path: Path) -> None:
    shapes = ((2, 7, 9, 384), (384,), (9, 64), (9, 64))
    given = [torch.randn(shape).half() for shape in shapes]
    out = torch.full((2, 7, 9, 128), torch.nan, dtype=torch.float16)
    sizes = {"num_heads": 2, "side": 5, "scale": 0.125}
    source = windowed_attention_source("float16", height=7, width=9, **sizes)
    run = RUN.replace("const void* third,", "const void* third, const void* fourth,").replace(
        "static_cast<T*>(out)", "static_cast<const T*>(fourth), static_cast<T*>(out)"
    )
    library = _build(source + run.replace("GRID", "dim3(kLaunch.x * batch)"), tmp_path)
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*given, out)]
    assert library.run(*addresses, 2) == 0
    wide = (x.float() for x in given)
    expected = torch_ops.windowed_attention_reference(*wide, **sizes)
    check_close(out.float().numpy(), expected.numpy(), "float16 kernel")


def test_the_four_kernels_of_channel_attention_compute_the_operator(tmp_path: Path) -> None:
    batch, height, width, channels, reduced = CHANNEL.values()
    generator = torch.Generator().manual_seed(0)
    shapes = [
        *((batch, height, width, channels), (channels,), (channels,), (channels, 1, 3, 3)),
        *((reduced, channels), (channels, reduced), (channels, channels)),
    ]
    given = [torch.randn(shape, generator=generator).half() for shape in shapes]
    hidden = torch.full((batch, height * width, channels), torch.nan, dtype=torch.float16)
    gated = torch.full((batch, channels, channels), torch.nan, dtype=torch.float16)
    library = _build(channel_attention_source("float16", **CHANNEL) + RUN_ALL, tmp_path)
    floats = ctypes.c_ulonglong()
    assert library.run(None, ctypes.c_float(0), ctypes.byref(floats)) == 0
    whole = host_library("channel_attention").dbsam_channel_attention_workspace
    assert floats.value * 4 == whole(*CHANNEL.values(), DTYPE_CODES["float16"])
    work = torch.full((floats.value,), torch.nan)
    pointers = [tensor.data_ptr() for tensor in (*given, hidden, gated, work)]
    tensors = (ctypes.c_void_p * 11)(*pointers)  # the epsilon lies behind the addresses
    assert library.run(tensors, ctypes.c_float(1e-6), ctypes.byref(floats)) == 0
    expected = torch_ops.channel_attention_reference(*(x.float() for x in given), epsilon=1e-6)
    check_close(hidden.float().numpy(), expected[0].numpy(), "float16")
    check_close(gated.float().numpy(), expected[1].numpy(), "float16")


def test_launches_are_read_out_of_ptx() -> None:
    numbers = (12, 64, 256, 6656, 3)
    content = [byte for number in numbers for byte in number.to_bytes(4, "little")]
    while not content[-1]:
        content.pop()  # as PTX does
    table = ", ".join(map(str, content))
    ptx = f".global .align 4 .b8 dbsam_quick_launch[20] = {{{table}}};"
    assert read_launches(ptx) == ([QuickLaunch((12, 64), 256, 6656)], 0)
    with pytest.raises(EngineError, match="left the launch sizes out"):
        read_launches(ptx.replace("launch", "lunch"))
