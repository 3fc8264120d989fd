"""C++ of the fused operators for one shape: what a quickly deployable plugin and NVRTC compile.

The attributes and shapes of a call are known to the compiler, so that a kernel takes addresses
alone. How it is launched stands in its PTX (kernels/quick/launch.h): `read_launches` finds it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import EngineError
from ..resources import resource_dir

KERNEL_NAME = "dbsam_quick"
"""Of the only kernel; those of an operator with several are `dbsam_quick_0` and so on."""
ELEMENTS = {"float32": "float", "float16": "dbsam::half_t", "bfloat16": "dbsam::bf16_t"}
"""Name of an element type → its C++ type in kernels/common.cuh."""

_HEAD = """\
#include "{folder}/quick/{operator}_quick.cuh"
using T = {element};
inline constexpr dbsam::quick::Problem kProblem{{{problem}}};
"""
_ONE = """\
inline constexpr dbsam::quick::Launch kLaunch = dbsam::quick::plan_launch<T>(kProblem);
extern "C" __device__ const int dbsam_quick_launch[5] = {
    kLaunch.x, kLaunch.y, kLaunch.threads, kLaunch.shared_bytes, kLaunch.resident};
extern "C" __global__ void __launch_bounds__(kLaunch.threads, kLaunch.resident)
    dbsam_quick(PARAMETERS, T* out) {
  dbsam::quick::run<T, kProblem>(ARGUMENTS, out);
}
"""
_SEVERAL = """\
using Tensors = dbsam::quick::Tensors<T>;
template <int i>
inline constexpr dbsam::quick::Launch kLaunch = dbsam::quick::plan_launch<T, kProblem>(i);
inline constexpr unsigned long long kFloats = dbsam::quick::plan_workspace<kProblem>();
#define DBSAM_NUMBERS(i) \\
  kLaunch<i>.x, kLaunch<i>.y, kLaunch<i>.threads, kLaunch<i>.shared_bytes, kLaunch<i>.resident
extern "C" __device__ const int dbsam_quick_launch[22] = {
    DBSAM_NUMBERS(0), DBSAM_NUMBERS(1), DBSAM_NUMBERS(2), DBSAM_NUMBERS(3),
    static_cast<int>(kFloats & 0x7FFFFFFF), static_cast<int>(kFloats >> 31)};
#define DBSAM_KERNEL(i) \\
  extern "C" __global__ void __launch_bounds__(kLaunch<i>.threads, kLaunch<i>.resident) \\
      dbsam_quick_##i(const Tensors tensors) { dbsam::quick::run<T, kProblem, i>(tensors); }
DBSAM_KERNEL(0) DBSAM_KERNEL(1) DBSAM_KERNEL(2) DBSAM_KERNEL(3)
"""
_TABLE = re.compile(r"\.b8 dbsam_quick_launch\[(\d+)\] = \{([\d, ]+)\}")
_NUMBERS = 5
"""Of a launch in the table."""


@dataclass(frozen=True)
class QuickLaunch:
    """How a kernel is launched.

    Attributes:
        blocks: along x and y; for one image or window where the batch is not known.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
    """

    blocks: tuple[int, int]
    threads: int
    shared_bytes: int


def _one(inputs: int = 3) -> str:
    """An operator's only kernel, with its inputs before its output."""
    names = ("first", "second", "third", "fourth")[:inputs]
    parameters = ", ".join(f"const T* {name}" for name in names)
    return _ONE.replace("PARAMETERS", parameters).replace("ARGUMENTS", ", ".join(names))


def ms_deform_attn_source(
    element: str,
    *,
    num_heads: int,
    head_dim: int,
    num_points: int,
    level_shapes: Sequence[int],
    query_shapes: Sequence[int],
) -> str:
    """C++ of MsDeformAttn for one shape; `element` is a key of `ELEMENTS`."""
    levels, queries = ", ".join(map(str, level_shapes)), ", ".join(map(str, query_shapes))
    problem = (
        f"{num_heads}, {head_dim}, {len(level_shapes) // 2}, {num_points}, "
        f"{{{levels}}}, {len(query_shapes) // 2}, {{{queries}}}"
    )
    return _source("ms_deform_attn", element, problem) + _one()


def rel_pos_attention_source(element: str, *, num_heads: int, side: int, scale: float) -> str:
    """C++ of RelPosAttention for one shape; `element` is a key of `ELEMENTS`."""
    exact = float(np.float32(scale)).hex()
    return _source("rel_pos_attention", element, f"{num_heads}, {side}, {exact}f") + _one()


def windowed_attention_source(
    element: str, *, num_heads: int, side: int, scale: float, height: int, width: int
) -> str:
    """C++ of WindowedAttention for maps of one shape; `element` is a key of `ELEMENTS`."""
    exact = float(np.float32(scale)).hex()
    problem = f"{height}, {width}, {side}, {num_heads}, {exact}f"
    return _source("windowed_attention", element, problem) + _one(inputs=4)


def depthwise_conv_gelu_source(element: str, *, height: int, width: int, channels: int) -> str:
    """C++ of DepthwiseConvGelu for one shape; `element` is a key of `ELEMENTS`."""
    return _source("depthwise_conv_gelu", element, f"{height}, {width}, {channels}") + _one()


def channel_attention_source(
    element: str,
    *,
    batch: int,
    height: int,
    width: int,
    channels: int,
    reduced: int,
) -> str:
    """C++ of ChannelAttention's four kernels for one shape and batch."""
    sizes = f"{batch}, {height}, {width}, {channels}, {reduced}"
    return _source("channel_attention", element, sizes) + _SEVERAL


def _source(operator: str, element: str, problem: str) -> str:
    return _HEAD.format(
        folder=resource_dir("kernels").resolve(),
        operator=operator,
        element=ELEMENTS[element],
        problem=problem,
    )


def read_launches(ptx: str) -> tuple[list[QuickLaunch], int]:
    """The launches that a source's PTX tells, and the bytes of its workspace.

    Raises:
        EngineError: the compiler left them out.
    """
    found = _TABLE.search(ptx)
    if found is None:
        raise EngineError("the compiler left the launch sizes out of the PTX of a kernel")
    # PTX leaves out zeros at the end.
    content = bytes(int(number) for number in found[2].split(",")).ljust(int(found[1]), b"\0")
    numbers = [number for (number,) in struct.iter_unpack("<i", content)]
    count, rest = divmod(len(numbers), _NUMBERS)
    launches = []
    for index in range(count):
        x, y, threads, shared_bytes, _ = numbers[index * _NUMBERS :][:_NUMBERS]
        launches.append(QuickLaunch((x, y), threads, shared_bytes))
    low, high = numbers[-rest:] if rest else (0, 0)
    return launches, 4 * (low + (high << 31))
