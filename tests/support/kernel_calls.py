"""Calls of the fused kernels on small maps with ragged ends, for the detector."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dbsam_deploy.kernels.library import DTYPE_CODES, call

Library = Any


GAP = 1 << 16
"""Elements around every tensor, so that whatever goes astray does not hit another one."""


def _random(*shape: int, dtype: str = "float32", size: float = 1.0) -> Tensor:
    values = torch.randn(shape) * size
    memory = torch.empty(values.numel() + 2 * GAP, dtype=getattr(torch, dtype))
    return memory[GAP:-GAP].view(shape).copy_(values)


def _addresses(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def deform(
    library: Library,
    dtype: str,
    batch: int,
    heads: int,
    depth: int,
    points: int,
    levels: list[tuple[int, int]],
    queries: list[tuple[int, int]],
) -> None:
    """`ms_deform_attn` with offsets that leave the maps."""
    tokens, asked = (sum(map(math.prod, shapes)) for shapes in (levels, queries))
    samples = heads * len(levels) * points
    tensors = [
        _random(batch, tokens, heads * depth, dtype=dtype),
        _random(batch, asked, samples * 2, dtype=dtype, size=3),
        _random(batch, asked, samples, dtype=dtype),
        _random(batch, asked, heads * depth, dtype=dtype),
    ]
    value_shapes, query_shapes = (
        [side for shape in shapes for side in shape] for shapes in (levels, queries)
    )
    sizes = (batch, heads, depth, len(levels), points, value_shapes, len(queries), query_shapes)
    code = DTYPE_CODES[dtype]
    call(library, "dbsam_ms_deform_attn", *_addresses(tensors), *sizes, code, None)


def channel(
    library: Library, dtype: str, batch: int, height: int, width: int, channels: int, reduced: int
) -> None:
    """`channel_attention`."""
    sizes, code = (batch, height, width, channels, reduced), DTYPE_CODES[dtype]
    shapes = [
        *((batch, height, width, channels), (channels,), (channels,), (channels, 9)),
        *((reduced, channels), (channels, reduced), (channels, channels)),
        *((batch, height, width, channels), (batch, channels, channels)),
    ]
    tensors = [_random(*shape, dtype=dtype) for shape in shapes]
    bytes_needed = library.dbsam_channel_attention_workspace(*sizes, code)
    tensors.append(_random(bytes_needed // 4))
    entry = "dbsam_channel_attention"
    call(library, entry, *_addresses(tensors), *sizes, 1e-6, code, None)


def rel_pos(
    library: Library, dtype: str, windows: int, side: int, heads: int, form: str = ""
) -> None:
    """`rel_pos_attention`, or its `form` "_compact"."""
    tensors = [
        _random(windows, side**2, 3 * heads * 64, dtype=dtype),
        _random(2 * side - 1, 64, dtype=dtype),
        _random(2 * side - 1, 64, dtype=dtype),
        _random(windows, side**2, heads * 64, dtype=dtype),
    ]
    sizes = (windows, side, heads, 64, 0.125, DTYPE_CODES[dtype], None)
    call(library, f"dbsam_rel_pos_attention{form}", *_addresses(tensors), *sizes)


def depthwise(
    library: Library, dtype: str, images: int, height: int, width: int, channels: int
) -> None:
    """`depthwise_conv_gelu`."""
    map_shape = (images, height, width, channels)
    shapes = (map_shape, (channels, 9), (channels,), map_shape)
    tensors = [_random(*shape, dtype=dtype) for shape in shapes]
    sizes = (*map_shape, DTYPE_CODES[dtype], None)
    call(library, "dbsam_depthwise_conv_gelu", *_addresses(tensors), *sizes)


def windowed(
    library: Library, dtype: str, batch: int, height: int, width: int, side: int, heads: int
) -> None:
    """`windowed_attention`."""
    tensors = [
        _random(batch, height, width, 3 * heads * 64, dtype=dtype),
        _random(3 * heads * 64, dtype=dtype),
        *(_random(2 * side - 1, 64, dtype=dtype) for _ in range(2)),
        _random(batch, height, width, heads * 64, dtype=dtype),
    ]
    sizes = (batch, height, width, side, heads, 64, 0.125, DTYPE_CODES[dtype], None)
    call(library, "dbsam_windowed_attention", *_addresses(tensors), *sizes)


RAGGED: dict[str, tuple[Callable[..., None], tuple[tuple[Any, ...], ...]]] = {
    "ms_deform_attn": (
        deform,
        (
            (2, 2, 24, 3, [(1, 9), (5, 1)], [(1, 9), (9, 3), (1, 1)]),
            (1, 2, 72, 2, [(4, 5)], [(11, 10)]),
        ),
    ),
    "channel_attention": (channel, ((3, 5, 11, 40, 10), (1, 9, 8, 8, 1), (1, 3, 7, 264, 66))),
    "rel_pos_attention": (rel_pos, ((2, 5, 2), (1, 12, 1), (1, 17, 1))),
    "depthwise_conv_gelu": (depthwise, ((3, 5, 11, 40), (1, 1, 1, 8), (2, 9, 35, 72))),
    "windowed_attention": (windowed, ((2, 5, 7, 4, 2), (1, 13, 20, 12, 1), (1, 2, 3, 17, 1))),
}
"""Operator → what calls it, and its sizes."""
