"""The fused kernels: their C entry points, built and loaded for the CPU emulation or for CUDA.

The entry points (`OPERATORS`) are plain C and take addresses of host memory on the emulation and of
device memory on CUDA. `dbsam_deploy.kernels.build` compiles and caches.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.choices import choose
from ..core.errors import EngineError
from ..machine.cuda_errors import cuda_error
from ..resources import resource_dir
from .build import (
    ResourceUsage,
    architecture_number,
    build_library,
    ptx_text,
    source_files,
    usage_of,
)

_ADDRESS, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_INTS = ctypes.POINTER(ctypes.c_int)

DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}
"""Name of an element type → the `dtype` argument of the entry points."""

ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
"""What a device library holds code for; PTX of the last one serves later GPUs."""

HOST_FLAGS = (
    *("-std=c++17", "-O2", "-x", "c++", "-DDBSAM_HOST", "-fPIC", "-shared", "-pthread"),
    # symbols of one library must not be bound to another's
    "-fno-gnu-unique",
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
)
"""How g++ compiles a kernel for the CPU emulation."""

STATUS = {
    -1: "the dtype code is none of 0 (float32), 1 (float16), 2 (bfloat16), or this kernel lacks it",
    -2: "a size is outside what the kernel covers (kernels/README.md)",
    -3: "an address is null or no multiple of 16 bytes",
    -4: "it needs more shared memory or blocks than the device has",
}
"""Meaning of the negative codes of kernels/common.cuh; positive ones are a cudaError_t."""


@dataclass(frozen=True)
class EntryPoint:
    """One C function.

    Attributes:
        name: its symbol.
        arguments: ctypes of its arguments, in order.
        result: `c_int` for a status, `c_size_t` for a number of bytes.
    """

    name: str
    arguments: tuple[Any, ...]
    result: Any = ctypes.c_int


@dataclass(frozen=True)
class Operator:
    """A fused operator: `kernels/<name>.cu` with what it includes.

    Attributes:
        name: stem of its files.
        entry_points: its C functions.
    """

    name: str
    entry_points: tuple[EntryPoint, ...]

    @property
    def source(self) -> Path:
        """The translation unit."""
        return resource_dir("kernels") / f"{self.name}.cu"


# value, offsets, weights, out, batch, heads, head_dim, levels, points, level_shapes, query_levels,
# query_shapes, dtype, stream
_DEFORM = (*(_ADDRESS,) * 4, *(_INT,) * 5, _INTS, _INT, _INTS, _INT, _ADDRESS)

# qkv, rel_pos_h, rel_pos_w, out; windows, side, heads, head_dim; scale; dtype; stream
_REL_POS = (*(_ADDRESS,) * 4, *(_INT,) * 4, _FLOAT, _INT, _ADDRESS)

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator(
            "ms_deform_attn",
            (EntryPoint("dbsam_ms_deform_attn", _DEFORM),),
        ),
        Operator(
            "channel_attention",
            (
                # x, norm_weight, norm_bias, dw_weight, fc1, fc2, pw_weight, hidden, gated_weight,
                # workspace; batch, height, width, channels, reduced; epsilon; dtype; stream
                EntryPoint(
                    "dbsam_channel_attention",
                    (*(_ADDRESS,) * 10, *(_INT,) * 5, _FLOAT, _INT, _ADDRESS),
                ),
                EntryPoint(
                    "dbsam_channel_attention_workspace", (_INT,) * 6, result=ctypes.c_size_t
                ),
            ),
        ),
        Operator(
            "rel_pos_attention",
            (
                EntryPoint("dbsam_rel_pos_attention", _REL_POS),
                EntryPoint("dbsam_rel_pos_attention_compact", _REL_POS),
            ),
        ),
        Operator(
            "depthwise_conv_gelu",
            (
                # x, weight, bias, out; images, height, width, channels; dtype; stream
                EntryPoint("dbsam_depthwise_conv_gelu", (*(_ADDRESS,) * 4, *(_INT,) * 5, _ADDRESS)),
            ),
        ),
        Operator(
            "windowed_attention",
            (
                # qkv, qkv_bias, rel_pos_h, rel_pos_w, out; batch, height, width, side, heads,
                # head_dim; scale; dtype; stream
                EntryPoint(
                    "dbsam_windowed_attention",
                    (*(_ADDRESS,) * 5, *(_INT,) * 6, _FLOAT, _INT, _ADDRESS),
                ),
            ),
        ),
    )
}
"""Name → operator, with the signatures of all entry points."""


def find_operator(name: str) -> Operator:
    """Operator of that name.

    Raises:
        InputError: there is none.
    """
    return choose("operator", name, OPERATORS)


def build_host_library(operator: str, folder: Path | None = None) -> Path:
    """Build an operator for the CPU emulation (kernels/host_emulation.h).

    Args:
        operator: name in `OPERATORS`.
        folder: cache to use instead of the user's.

    Raises:
        InputError: unknown operator.
        EngineError: no g++, or it refuses the source.
    """
    chosen = find_operator(operator)
    return build_library(f"host-{operator}", "g++", (chosen.source,), HOST_FLAGS, folder)


def build_device_library(
    architectures: Sequence[str] = ARCHITECTURES,
    *,
    operators: Sequence[str] = tuple(OPERATORS),
    folder: Path | None = None,
) -> Path:
    """Build the operators for CUDA, all in one library.

    Args:
        architectures: code for each, for example "sm_90"; PTX for the last one besides.
        operators: names in `OPERATORS`.
        folder: cache to use instead of the user's.

    Raises:
        InputError: unknown operator, or an architecture that is not spelled so.
        EngineError: no nvcc, or it refuses a source.
    """
    numbers = [architecture_number(name) for name in architectures]
    codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    codes.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    flags = ("-std=c++17", "-O3", "-lineinfo", "-shared", "-Xcompiler=-fPIC", *codes)
    sources = [find_operator(name).source for name in operators]
    return build_library("device", "nvcc", sources, flags, folder)


@functools.cache
def load_library(path: Path, operators: tuple[str, ...]) -> ctypes.CDLL:
    """Load a library and declare the signatures of the operators' entry points.

    Raises:
        EngineError: it cannot be loaded or lacks one.
    """
    try:
        library = ctypes.CDLL(str(path))
        for entry in (e for name in operators for e in find_operator(name).entry_points):
            function = getattr(library, entry.name)
            function.argtypes, function.restype = entry.arguments, entry.result
    except (OSError, AttributeError) as error:
        raise EngineError(f"kernel library {path}: {error}; delete it to have it rebuilt") from None
    return library


def host_library(operator: str, folder: Path | None = None) -> ctypes.CDLL:
    """The operator on the CPU emulation; see `build_host_library`. Addresses are host memory."""
    return load_library(build_host_library(operator, folder), (operator,))


def device_library(
    architectures: Sequence[str] = ARCHITECTURES,
    *,
    operators: Sequence[str] = tuple(OPERATORS),
    folder: Path | None = None,
) -> ctypes.CDLL:
    """The operators on CUDA; see `build_device_library`. Addresses are device memory."""
    path = build_device_library(architectures, operators=operators, folder=folder)
    return load_library(path, tuple(operators))


def call(library: Any, entry_point: str, *arguments: Any) -> None:
    """Call a kernel and check its status.

    Args:
        library: from `host_library` or `device_library`, or an `NvrtcKernels`.
        entry_point: symbol in `OPERATORS`.
        arguments: its arguments in order: addresses as int, sequences of int for `const int*`.

    Raises:
        EngineError: the kernel refused its arguments, or CUDA could not launch it.
    """
    values = [_int_array(v) if isinstance(v, list | tuple) else v for v in arguments]
    status = getattr(library, entry_point)(*values)
    if status > 0:
        raise EngineError(f"{entry_point}: {cuda_error(status)} at the launch")
    if status < 0:
        meaning = STATUS.get(status, "a code that kernels/common.cuh does not list")
        raise EngineError(f"{entry_point} refuses its arguments (status {status}): {meaning}")


def _int_array(values: Sequence[int]) -> ctypes.Array[ctypes.c_int]:
    return (ctypes.c_int * len(values))(*values)


def operator_sources(operator: str) -> tuple[Path, ...]:
    """The operator's source and everything it includes, the source first.

    Raises:
        InputError: unknown operator.
        EngineError: a file is missing.
    """
    return source_files(find_operator(operator).source)


def compile_ptx(operator: str, architecture: str) -> str:
    """PTX of an operator's kernels; see `dbsam_deploy.kernels.build.ptx_text`."""
    return ptx_text(find_operator(operator).source, architecture)


def resource_usage(operator: str, architecture: str) -> tuple[ResourceUsage, ...]:
    """What ptxas counts of an operator; see `dbsam_deploy.kernels.build.usage_of`."""
    return usage_of(find_operator(operator).source, architecture)
