"""The kernels on the CPU emulation, watched: races and accesses out of bounds become errors.

kernels/host_detector.h says what is found. A library here is called like one of `library`.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import EngineError
from .build import build_library
from .library import DTYPE_CODES, HOST_FLAGS, find_operator, load_library

FLAGS = (
    *(flag for flag in HOST_FLAGS if not flag.startswith("-O")),
    *("-O1", "-g1", "-DDBSAM_DETECT", "-fsanitize=thread"),
    # the compiler's calls alone: without its library, whose functions are ours
    *("--param=tsan-instrument-func-entry-exit=0", "-nodefaultlibs"),
    *("-Wl,--no-as-needed", "-lstdc++", "-lm", "-lc", "-lgcc_s"),
)
_EMULATION = ("host_", "common.cuh", "warp_matrix.cuh")
"""Files that a finding's place is not named in."""

_BYTES = {0: 4, 1: 2, 2: 2}


@dataclass(frozen=True)
class Tensor:
    """Memory that a call may touch.

    Attributes:
        name: as in kernels/entry_points.h.
        address: of its first byte.
        bytes: its size.
        writable: False for an input.
    """

    name: str
    address: int
    bytes: int
    writable: bool = False


def _tensors(
    dtype: int, addresses: Sequence[Any], counts: dict[str, int], written: Sequence[str]
) -> list[Tensor]:
    size = _BYTES.get(dtype, 0)
    return [
        Tensor(name, address or 0, max(count, 0) * size, name in written)
        for address, (name, count) in zip(addresses, counts.items(), strict=True)
    ]


def _cells(shapes: Sequence[int]) -> int:
    return sum(math.prod(shapes[i : i + 2]) for i in range(0, len(shapes), 2))


def _deform_tensors(library: ctypes.CDLL, arguments: Sequence[Any]) -> list[Tensor]:
    batch, heads, head_dim, levels, points, level_shapes, _, query_shapes, dtype, _ = arguments[4:]
    queries = batch * _cells(query_shapes)
    samples = heads * levels * points
    counts = {
        "value": batch * _cells(level_shapes) * heads * head_dim,
        "offsets": queries * samples * 2,
        "weights": queries * samples,
        "out": queries * heads * head_dim,
    }
    return _tensors(dtype, arguments[:4], counts, ("out",))


def _channel_tensors(library: ctypes.CDLL, arguments: Sequence[Any]) -> list[Tensor]:
    batch, height, width, channels, reduced, _, dtype, _ = arguments[10:]
    tokens = batch * height * width * channels
    counts = {
        "x": tokens,
        "norm_weight": channels,
        "norm_bias": channels,
        "dw_weight": channels * 9,
        "fc1": reduced * channels,
        "fc2": reduced * channels,
        "pw_weight": channels**2,
        "hidden": tokens,
        "gated_weight": batch * channels**2,
    }
    workspace = library.dbsam_channel_attention_workspace(*arguments[10:15], dtype)
    return [
        *_tensors(dtype, arguments[:9], counts, ("hidden", "gated_weight")),
        Tensor("workspace", arguments[9] or 0, workspace, True),
    ]


def _rel_pos_tensors(library: ctypes.CDLL, arguments: Sequence[Any]) -> list[Tensor]:
    windows, side, heads, head_dim, _, dtype, _ = arguments[4:]
    tokens = windows * side**2 * heads * head_dim
    table = (2 * side - 1) * head_dim
    counts = {"qkv": 3 * tokens, "rel_pos_h": table, "rel_pos_w": table, "out": tokens}
    return _tensors(dtype, arguments[:4], counts, ("out",))


def _windowed_tensors(library: ctypes.CDLL, arguments: Sequence[Any]) -> list[Tensor]:
    batch, height, width, side, heads, head_dim, _, dtype, _ = arguments[5:]
    channels = heads * head_dim
    cells, table = batch * height * width, (2 * side - 1) * head_dim
    counts = {
        "qkv": 3 * cells * channels,
        "qkv_bias": 3 * channels,
        "rel_pos_h": table,
        "rel_pos_w": table,
        "out": cells * channels,
    }
    return _tensors(dtype, arguments[:5], counts, ("out",))


def _depthwise_tensors(library: ctypes.CDLL, arguments: Sequence[Any]) -> list[Tensor]:
    images, height, width, channels, dtype, _ = arguments[4:]
    tokens = images * height * width * channels
    counts = {"x": tokens, "weight": channels * 9, "bias": channels, "out": tokens}
    return _tensors(dtype, arguments[:4], counts, ("out",))


_TENSORS: dict[str, Callable[[ctypes.CDLL, Sequence[Any]], list[Tensor]]] = {
    "dbsam_ms_deform_attn": _deform_tensors,
    "dbsam_channel_attention": _channel_tensors,
    "dbsam_rel_pos_attention": _rel_pos_tensors,
    "dbsam_rel_pos_attention_compact": _rel_pos_tensors,
    "dbsam_depthwise_conv_gelu": _depthwise_tensors,
    "dbsam_windowed_attention": _windowed_tensors,
}
"""Entry point → the tensors of a call, from its arguments."""


class DetectingLibrary:
    """An operator's entry points; a call raises for what the detector finds.

    Attributes are functions with the arguments of kernels/entry_points.h, as of a `ctypes.CDLL`.
    """

    def __init__(self, path: Path, operator: str) -> None:
        self._path = path
        self._library = load_library(path, (operator,))
        self._library.dbsam_detect_findings.restype = ctypes.c_char_p
        self._library.dbsam_detect_allow.argtypes = (
            *(ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
        )

    def __getattr__(self, name: str) -> Callable[..., int]:
        function = getattr(self._library, name)
        if name not in _TENSORS:
            if function.restype is ctypes.c_int:
                raise EngineError(f"{name}: the detector does not know its tensors (detector.py)")
            return function  # a size, which runs no kernel

        def call(*arguments: Any) -> int:
            self._library.dbsam_detect_begin()
            for tensor in _TENSORS[name](self._library, arguments):
                self._library.dbsam_detect_allow(
                    tensor.name.encode(), tensor.address, tensor.bytes, tensor.writable
                )
            status: int = function(*arguments)
            if findings := self._library.dbsam_detect_findings().decode().splitlines():
                raise EngineError(
                    f"{name}: the detector finds {len(findings)} mistakes in the kernel",
                    *(self._explain(line) for line in findings),
                )
            return status

        return call

    def _explain(self, line: str) -> str:
        """A finding with the source's lines, the innermost first."""
        code, _, text = line.partition("|")
        if not int(code, 16) or not shutil.which("addr2line"):
            return text
        address = f"{int(code, 16) - 1:x}"
        command = ("addr2line", "-i", "-s", "-e", str(self._path), address)
        places = subprocess.run(command, capture_output=True, text=True).stdout.split()
        kernels = [p for p in places if ":" in p and not p.startswith(_EMULATION)]
        return f"{text} at {' < '.join(kernels or places)}"


def detecting_library(
    operator: str,
    *,
    dtype: str | None = None,
    source: Path | None = None,
    folder: Path | None = None,
) -> DetectingLibrary:
    """Build and load an operator with the detector.

    Args:
        operator: name in `OPERATORS`.
        dtype: the only element type to compile, a key of `DTYPE_CODES`; a third of the time.
        source: compile this copy of the operator's source, with what lies beside it.
        folder: cache to use instead of the user's.

    Raises:
        InputError: unknown operator.
        EngineError: no g++, or it refuses the source.
    """
    only = () if dtype is None else (f"-DDBSAM_ONLY_DTYPE={DTYPE_CODES[dtype]}",)
    sources = (source or find_operator(operator).source,)
    path = build_library(f"detect-{operator}", "g++", sources, (*FLAGS, *only), folder)
    return DetectingLibrary(path, operator)
