"""The operators' entry points on kernels that NVRTC compiles: the route without nvcc.

`NvrtcKernels` has the functions of kernels/entry_points.h, with their arguments and their status,
and stands in for the library that nvcc makes. A kernel is compiled for each shape (half a second
each, kept in the user's cache) and launched through the driver's own functions.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files.private import cache_folder, find_kept, keep, private_folder
from ..machine.hardware import DRIVER_LIBRARY
from ..resources import resource_dir
from . import quick_sources as sources
from .build import digest_of, source_files
from .nvrtc import compile_source, entry_names, find_nvrtc
from .quick_sources import ELEMENTS, QuickLaunch, read_launches

_LOG = logging.getLogger(__name__)
_MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"""
_INVALID_VALUE = 1
_DTYPE, _SHAPE, _ALIGNMENT, _LIMITS = -1, -2, -3, -4
"""See kernels/common.cuh."""
_GRID = 65535
"""Most blocks along y and z."""
_INT = 2**31 - 1
_ADDRESSES = 10
"""Of channel attention."""
_HEAD_DIM = "head_dim"
_TYPES = tuple(ELEMENTS)
"""In the order of the kernels' numbers (`library.DTYPE_CODES`)."""


@dataclass(frozen=True)
class Specialised:
    """Compiled kernels of one call.

    Attributes:
        cubin: their code.
        names: of the kernels, in the order of their launches.
        launches: how each is launched.
        workspace_bytes: of memory that they share.
    """

    cubin: bytes
    names: tuple[str, ...]
    launches: tuple[QuickLaunch, ...]
    workspace_bytes: int


def specialise(operator: str, source: str, architecture: str, folder: Path | None) -> Specialised:
    """Compile a source of `quick_sources`, unless the cache has it.

    Args:
        operator: stem of its files.
        source: the translation unit.
        architecture: GPU, "sm_90".
        folder: cache to use instead of the user's.

    Raises:
        EngineError: no NVRTC, it refuses the source, or the cache is not this user's alone.
    """
    folder = private_folder(folder or cache_folder("kernels"), "kernels")
    files = source_files(resource_dir("kernels") / "quick" / f"{operator}_quick.cuh")
    name = f"nvrtc-{digest_of(files, (source, architecture), find_nvrtc().version)}"
    if (found := find_kept(folder, name, ".bin")) is None:
        made = compile_source(source, architecture)
        launches, workspace = read_launches(made.ptx)
        head = {
            "names": sorted(entry_names(made.ptx)),
            "launches": [asdict(launch) for launch in launches],
            "workspace_bytes": workspace,
        }
        content = json.dumps(head).encode() + b"\n" + made.cubin
        keep(folder, name, ".bin", content)
    else:
        content = found[1]
    line, _, cubin = content.partition(b"\n")
    told = json.loads(line)
    launches = [
        QuickLaunch((one["blocks"][0], one["blocks"][1]), one["threads"], one["shared_bytes"])
        for one in told["launches"]
    ]
    return Specialised(cubin, tuple(told["names"]), tuple(launches), told["workspace_bytes"])


class NvrtcKernels:
    """The operators on one GPU, whose context is current in the thread that calls.

    Args:
        architecture: the GPU's, "sm_90".
        folder: cache to use instead of the user's.
        load: opens the driver's library.

    Raises:
        EngineError: no NVRTC, or no driver.
    """

    def __init__(
        self,
        architecture: str,
        folder: Path | None = None,
        load: Callable[[str], Any] = ctypes.CDLL,
    ) -> None:
        nvrtc = find_nvrtc()
        _LOG.info(
            "no nvcc is here: NVRTC %s (%s) compiles the fused kernels for %s",
            *(nvrtc.version, nvrtc.path, architecture),
        )
        self._architecture, self._folder, self._driver = architecture, folder, load(DRIVER_LIBRARY)
        self._specialised: dict[str, Specialised] = {}
        self._functions: dict[str, list[tuple[ctypes.c_void_p, QuickLaunch]]] = {}
        self._lock = threading.Lock()

    def dbsam_ms_deform_attn(self, *arguments: Any) -> int:
        """See kernels/entry_points.h."""
        *addresses, batch, heads, depth, levels, points = arguments[:9]
        level_shapes, query_levels, query_shapes, dtype, stream = arguments[9:]
        if (refused := refuse_deform(arguments)) or not batch:
            return refused
        source = sources.ms_deform_attn_source(
            _TYPES[dtype],
            num_heads=heads,
            head_dim=depth,
            num_points=points,
            level_shapes=list(level_shapes)[: 2 * levels],
            query_shapes=list(query_shapes)[: 2 * query_levels],
        )
        return self._run("ms_deform_attn", source, _each(addresses), stream, images=batch)

    def dbsam_rel_pos_attention(self, *arguments: Any) -> int:
        """See kernels/entry_points.h."""
        sizes = ("side", "num_heads", _HEAD_DIM, "scale")
        return self._run_flat("rel_pos_attention", refuse_rel_pos, sizes, arguments)

    def dbsam_depthwise_conv_gelu(self, *arguments: Any) -> int:
        """See kernels/entry_points.h."""
        sizes = ("height", "width", "channels")
        return self._run_flat("depthwise_conv_gelu", refuse_depthwise, sizes, arguments)

    def dbsam_windowed_attention(self, *arguments: Any) -> int:
        """See kernels/entry_points.h."""
        sizes = ("height", "width", "side", "num_heads", _HEAD_DIM, "scale")
        return self._run_flat("windowed_attention", refuse_windowed, sizes, arguments)

    def dbsam_channel_attention(self, *arguments: Any) -> int:
        """See kernels/entry_points.h."""
        *addresses, batch, height, width, channels, reduced, epsilon, dtype, stream = arguments
        if refused := refuse_channel(arguments):
            return refused
        source = _channel_source(dtype, (batch, height, width, channels, reduced))
        tensors = _Tensors((ctypes.c_void_p * _ADDRESSES)(*addresses), epsilon)
        return self._run("channel_attention", source, [tensors], stream)

    def dbsam_channel_attention_workspace(self, *arguments: Any) -> int:
        """See kernels/entry_points.h."""
        *sizes, dtype = arguments
        if _channel_sizes_refused(sizes) or dtype not in range(len(_TYPES)):
            return 0
        return self._kernels("channel_attention", _channel_source(dtype, sizes)).workspace_bytes

    def _run_flat(
        self,
        operator: str,
        refuse: Callable[[Sequence[Any]], int],
        names: Sequence[str],
        arguments: Sequence[Any],
    ) -> int:
        """Launch an operator whose images, or windows, lie one after the other along x.

        Args:
            operator: stem of its files.
            refuse: status with which it refuses its arguments.
            names: of the sizes between the count and the dtype, as its source takes them.
            arguments: of the entry point: addresses, count, sizes, dtype, stream.
        """
        *first, dtype, stream = arguments
        *addresses, count = first[: -len(names)]
        if (refused := refuse(arguments)) or not count:
            return refused
        sizes = dict(zip(names, first[-len(names) :], strict=True))
        sizes.pop(_HEAD_DIM, None)  # the kernels have one, which `refuse` looks for
        source = getattr(sources, f"{operator}_source")(_TYPES[dtype], **sizes)
        return self._run(operator, source, _each(addresses), stream, windows=count)

    def _kernels(self, operator: str, source: str) -> Specialised:
        with self._lock:
            if source not in self._specialised:
                made = specialise(operator, source, self._architecture, self._folder)
                self._specialised[source] = made
            return self._specialised[source]

    def _run(
        self,
        operator: str,
        source: str,
        arguments: Sequence[Any],
        stream: int | None,
        *,
        images: int = 1,
        windows: int = 1,
    ) -> int:
        """Launch a source's kernels in their order; returns 0 or the first status that is not."""
        status, functions = self._loaded(source, self._kernels(operator, source))
        places = (ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in arguments)
        parameters = (ctypes.c_void_p * len(arguments))(*places)
        for function, launch in functions:
            grid = (launch.blocks[0] * windows, launch.blocks[1], images)
            if grid[0] > _INT or max(grid[1:]) > _GRID:
                return _LIMITS
            sizes = map(ctypes.c_uint, (*grid, launch.threads, 1, 1, launch.shared_bytes))
            place = ctypes.c_void_p(stream)
            status = self._driver.cuLaunchKernel(function, *sizes, place, parameters, None)
            if status:
                break
        return int(status)

    def _loaded(
        self, source: str, kernels: Specialised
    ) -> tuple[int, list[tuple[ctypes.c_void_p, QuickLaunch]]]:
        """The kernels in the current context, loaded once."""
        with self._lock:
            if source in self._functions:
                return 0, self._functions[source]
            module, found = ctypes.c_void_p(), []
            status = self._driver.cuModuleLoadData(ctypes.byref(module), kernels.cubin)
            for name, launch in zip(kernels.names, kernels.launches, strict=True):
                function = ctypes.c_void_p()
                status = status or self._driver.cuModuleGetFunction(
                    ctypes.byref(function), module, name.encode()
                )
                if not status and launch.shared_bytes:
                    status = self._driver.cuFuncSetAttribute(
                        function, _MAX_DYNAMIC_SHARED, ctypes.c_int(launch.shared_bytes)
                    )
                    status = _LIMITS if status == _INVALID_VALUE else status
                found.append((function, launch))
            if status:
                return int(status), []
            self._functions[source] = found
            return 0, found


class _Tensors(ctypes.Structure):
    """`Tensors` of kernels/quick/channel_attention_quick.cuh."""

    _fields_ = (("addresses", ctypes.c_void_p * _ADDRESSES), ("epsilon", ctypes.c_float))


def _each(addresses: Sequence[int]) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(address) for address in addresses]


def _channel_source(dtype: int, sizes: Sequence[int]) -> str:
    batch, height, width, channels, reduced = sizes
    return sources.channel_attention_source(
        _TYPES[dtype], batch=batch, height=height, width=width, channels=channels, reduced=reduced
    )


def _aligned(addresses: Sequence[int | None]) -> bool:
    return all(address is not None and address and address % 16 == 0 for address in addresses)


def refuse_deform(arguments: Sequence[Any]) -> int:
    """Status with which ms_deform_attn.cu refuses its arguments, 0 if it takes them."""
    *addresses, batch, heads, depth, levels, points = arguments[:9]
    level_shapes, query_levels, query_shapes, dtype, _ = arguments[9:]
    cells = [_cells(level_shapes, levels), _cells(query_shapes, query_levels)]
    if batch < 0 or heads < 1 or not 8 <= depth <= 256 or depth % 8 or not 1 <= points <= 8:
        return _SHAPE
    widest = max(depth, 2 * levels * points)
    if min(cells) < 0 or max(cells) * heads > _INT // widest:
        return _SHAPE
    if dtype not in range(len(_TYPES)):
        return _DTYPE
    return 0 if not batch or _aligned(addresses) else _ALIGNMENT


def _cells(shapes: Sequence[int], count: int) -> int:
    """Cells of all levels, or -1."""
    sizes = list(shapes)[: 2 * count] if 1 <= count <= 8 else []
    if not sizes or min(sizes) < 1:
        return -1
    found = sum(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
    return found if found <= _INT else -1


def refuse_rel_pos(arguments: Sequence[Any]) -> int:
    """Status with which rel_pos_attention.cu refuses its arguments, 0 if it takes them."""
    *addresses, windows, side, heads, depth, scale, dtype, _ = arguments
    sizes = windows >= 0 and 1 <= side <= 64 and 1 <= heads <= 1024 and depth == 64
    if not (sizes and 0 < scale < math.inf):
        return _SHAPE
    if dtype not in range(len(_TYPES)):
        return _DTYPE
    return 0 if not windows or _aligned(addresses) else _ALIGNMENT


def refuse_windowed(arguments: Sequence[Any]) -> int:
    """Status with which windowed_attention.cu refuses its arguments, 0 if it takes them."""
    *addresses, batch, height, width, side, heads, depth, scale, dtype, _ = arguments
    sizes = batch >= 0 and min(height, width) >= 1 and 1 <= side <= 64 and 1 <= heads <= 1024
    if not (sizes and depth == 64 and 0 < scale < math.inf):
        return _SHAPE
    if 3 * heads * depth * (height + side) * (width + side) > _INT:
        return _SHAPE
    if dtype not in range(len(_TYPES)):
        return _DTYPE
    return 0 if not batch or _aligned(addresses) else _ALIGNMENT


def refuse_depthwise(arguments: Sequence[Any]) -> int:
    """Status with which depthwise_conv_gelu.cu refuses its arguments, 0 if it takes them."""
    *addresses, images, height, width, channels, dtype, _ = arguments
    sizes = images >= 0 and min(height, width) >= 1 and channels >= 8 and channels % 8 == 0
    if not sizes or height * width > _INT // channels:
        return _SHAPE
    if dtype not in range(len(_TYPES)):
        return _DTYPE
    return 0 if not images or _aligned(addresses) else _ALIGNMENT


def refuse_channel(arguments: Sequence[Any]) -> int:
    """Status with which channel_attention.cu refuses its arguments, 0 if it takes them."""
    *addresses, batch, height, width, channels, reduced, _, dtype, _ = arguments
    if _channel_sizes_refused((batch, height, width, channels, reduced)):
        return _SHAPE
    if not _aligned(addresses):
        return _ALIGNMENT
    return 0 if dtype in range(len(_TYPES)) else _DTYPE


def _channel_sizes_refused(sizes: Sequence[int]) -> bool:
    batch, height, width, channels, reduced = sizes
    if not 1 <= batch <= _GRID or min(height, width, reduced) < 1:
        return True
    if not 8 <= channels <= 1024 or channels % 8:
        return True
    return height * ((width - 1) // 8 + 1) * batch > _INT
