"""The fused operators in PyTorch: `torch.ops.dbsam.*` on the kernels, and their references.

`*_reference` (`references.py`) say in plain PyTorch what each kernel computes.

`ms_deform_attn`, `channel_attention`, `rel_pos_attention`, `depthwise_conv_gelu` and
`windowed_attention` are custom operators that `torch.compile` and `torch.export` keep as one call,
with the arguments of their references. On CUDA tensors they launch the compiled kernels on the
current stream; on CPU tensors they run the reference. They are for inference: no gradients.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from . import library as kernels
from .nvrtc import has_nvcc
from .nvrtc_kernels import NvrtcKernels
from .references import (
    as_shapes,
    channel_attention_reference,
    depthwise_conv_gelu_reference,
    ms_deform_attn_reference,
    rel_pos_attention_reference,
    windowed_attention_reference,
)

__all__ = [
    "DTYPE_CODES",
    "as_shapes",
    "channel_attention",
    "channel_attention_reference",
    "depthwise_conv_gelu",
    "depthwise_conv_gelu_reference",
    "kernel_library",
    "ms_deform_attn",
    "ms_deform_attn_reference",
    "rel_pos_attention",
    "rel_pos_attention_reference",
    "windowed_attention",
    "windowed_attention_reference",
]

DTYPE_CODES = {getattr(torch, name): code for name, code in kernels.DTYPE_CODES.items()}
"""dtype → the number by which the kernels' entry points know it."""


@functools.cache
def kernel_library(device: torch.device) -> ctypes.CDLL | NvrtcKernels:
    """The kernels, built for this device's architecture where the cache has none yet.

    nvcc builds them all at once; without it NVRTC does, each when it is first called.

    Raises:
        EngineError: neither nvcc nor NVRTC, or the compiler refuses a source.
    """
    major, minor = torch.cuda.get_device_capability(device)
    target = f"sm_{major}{minor}"
    return kernels.device_library((target,)) if has_nvcc() else NvrtcKernels(target)


def _operator(
    reference: Callable[..., Any],
) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Make a function the operator `dbsam::<its name>`, which is called as `reference` is."""
    schema = torch.library.infer_schema(reference, mutates_args=())

    def made(function: Callable[..., Any]) -> torch.library.CustomOpDef:
        name = f"dbsam::{function.__name__}"
        return torch.library.custom_op(name, function, mutates_args=(), schema=schema)

    return made


@_operator(ms_deform_attn_reference)
def ms_deform_attn(
    value: Tensor, offsets: Tensor, weights: Tensor, *, num_heads: int, num_points: int, **maps: Any
) -> Tensor:
    """Fused multi-scale deformable attention; see `ms_deform_attn_reference`.

    Raises:
        InputError: a shape, dtype, device or stride that does not fit.
        EngineError: the kernel refuses the arguments, or CUDA reports an error.
    """
    level_shapes, query_shapes = list(maps["level_shapes"]), list(maps["query_shapes"])
    levels, sources = as_shapes(level_shapes), as_shapes(query_shapes)
    batch, channels = value.shape[0], value.shape[-1]
    queries = sum(height * width for height, width in sources)
    samples = num_heads * len(levels) * num_points
    tokens = sum(height * width for height, width in levels)
    depth = _divide("ms_deform_attn", channels, num_heads)
    dtype = _check_tensors(
        "ms_deform_attn",
        value=(value, (batch, tokens, channels)),
        offsets=(offsets, (batch, queries, 2 * samples)),
        weights=(weights, (batch, queries, samples)),
    )
    if not _has_kernels(value):
        return ms_deform_attn_reference(
            value, offsets, weights, num_heads=num_heads, num_points=num_points, **maps
        )
    out = value.new_empty((batch, queries, channels))
    _launch(
        "dbsam_ms_deform_attn",
        (value, offsets, weights, out),
        (batch, num_heads, depth, len(levels), num_points, level_shapes),
        (len(sources), query_shapes, dtype),
    )
    return out


@ms_deform_attn.register_fake
def _(value: Tensor, offsets: Tensor, weights: Tensor, **sizes: Any) -> Tensor:
    return value.new_empty((value.shape[0], offsets.shape[1], value.shape[2]))


@_operator(channel_attention_reference)
def channel_attention(x: Tensor, *parameters: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Fused channel attention; see `channel_attention_reference`.

    Raises:
        InputError: a shape, dtype, device or stride that does not fit.
        EngineError: the kernel refuses the arguments, or CUDA reports an error.
    """
    if x.dim() != 4:
        raise InputError(f"channel_attention: x has {x.dim()} axes, expected (B, H, W, C)")
    batch, height, width, channels = x.shape
    norm_weight, norm_bias, dw_weight, fc1, fc2, pw_weight = parameters
    reduced = fc1.shape[0]
    dtype = _check_tensors(
        "channel_attention",
        x=(x, (batch, height, width, channels)),
        norm_weight=(norm_weight, (channels,)),
        norm_bias=(norm_bias, (channels,)),
        dw_weight=(dw_weight, (channels, 1, 3, 3)),
        fc1=(fc1, (reduced, channels)),
        fc2=(fc2, (channels, reduced)),
        pw_weight=(pw_weight, (channels, channels)),
    )
    if not _has_kernels(x):
        return channel_attention_reference(x, *parameters, epsilon=epsilon)
    hidden = x.new_empty((batch, height * width, channels))
    gated_weight = x.new_empty((batch, channels, channels))
    sizes = (batch, height, width, channels, reduced)
    count = kernel_library(x.device).dbsam_channel_attention_workspace(*sizes, dtype)
    workspace = x.new_empty(count, dtype=torch.uint8)
    _launch(
        "dbsam_channel_attention",
        (x, *parameters, hidden, gated_weight, workspace),
        sizes,
        (epsilon, dtype),
    )
    return hidden, gated_weight


@channel_attention.register_fake
def _(x: Tensor, *parameters: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = x.shape
    hidden = x.new_empty((batch, height * width, channels))
    return hidden, x.new_empty((batch, *parameters[-1].shape))


@_operator(rel_pos_attention_reference)
def rel_pos_attention(
    qkv: Tensor, *tables: Tensor, num_heads: int, side: int, scale: float
) -> Tensor:
    """Fused attention with relative positions; see `rel_pos_attention_reference`.

    Raises:
        InputError: a shape, dtype, device or stride that does not fit.
        EngineError: the kernel refuses the arguments, or CUDA reports an error.
    """
    rel_pos_h, rel_pos_w = tables
    windows, packed = qkv.shape[0], qkv.shape[-1]
    depth = _divide("rel_pos_attention", packed, 3 * num_heads)
    dtype = _check_tensors(
        "rel_pos_attention",
        qkv=(qkv, (windows, side * side, packed)),
        rel_pos_h=(rel_pos_h, (2 * side - 1, depth)),
        rel_pos_w=(rel_pos_w, (2 * side - 1, depth)),
    )
    if not _has_kernels(qkv):
        return rel_pos_attention_reference(
            qkv, *tables, num_heads=num_heads, side=side, scale=scale
        )
    out = qkv.new_empty((windows, side * side, num_heads * depth))
    _launch(
        "dbsam_rel_pos_attention",
        (qkv, *tables, out),
        (windows, side, num_heads, depth),
        (scale, dtype),
    )
    return out


@rel_pos_attention.register_fake
def _(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, **sizes: Any) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3))


@_operator(depthwise_conv_gelu_reference)
def depthwise_conv_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, *, height: int, width: int
) -> Tensor:
    """Fused depthwise 3×3, bias and GELU; see `depthwise_conv_gelu_reference`.

    Raises:
        InputError: a shape, dtype, device or stride that does not fit.
        EngineError: the kernel refuses the arguments, or CUDA reports an error.
    """
    batch, tokens, channels = x.shape[0], x.shape[1], x.shape[-1]
    if min(height, width) < 1 or tokens % (height * width):
        raise InputError(
            f"depthwise_conv_gelu: {tokens} tokens, expected those of whole maps of height × width "
            f"= {height}×{width}"
        )
    dtype = _check_tensors(
        "depthwise_conv_gelu",
        x=(x, (batch, tokens, channels)),
        weight=(weight, (channels, 1, 3, 3)),
        bias=(bias, (channels,)),
    )
    if not _has_kernels(x):
        return depthwise_conv_gelu_reference(x, weight, bias, height=height, width=width)
    out = x.new_empty(x.shape)
    sizes = (batch * (tokens // (height * width)), height, width, channels)
    _launch("dbsam_depthwise_conv_gelu", (x, weight, bias, out), sizes, (dtype,))
    return out


@depthwise_conv_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, *, height: int, width: int) -> Tensor:
    return x.new_empty(x.shape)


@_operator(windowed_attention_reference)
def windowed_attention(
    qkv: Tensor, *parameters: Tensor, num_heads: int, side: int, scale: float
) -> Tensor:
    """Fused attention within the windows of a map; see `windowed_attention_reference`.

    Raises:
        InputError: a shape, dtype, device or stride that does not fit.
        EngineError: the kernel refuses the arguments, or CUDA reports an error.
    """
    if qkv.dim() != 4:
        raise InputError(f"windowed_attention: qkv has {qkv.dim()} axes, expected (B, H, W, 3·C)")
    batch, height, width, packed = qkv.shape
    qkv_bias, rel_pos_h, rel_pos_w = parameters
    depth = _divide("windowed_attention", packed, 3 * num_heads)
    dtype = _check_tensors(
        "windowed_attention",
        qkv=(qkv, (batch, height, width, packed)),
        qkv_bias=(qkv_bias, (packed,)),
        rel_pos_h=(rel_pos_h, (2 * side - 1, depth)),
        rel_pos_w=(rel_pos_w, (2 * side - 1, depth)),
    )
    if not _has_kernels(qkv):
        return windowed_attention_reference(
            qkv, *parameters, num_heads=num_heads, side=side, scale=scale
        )
    out = qkv.new_empty((batch, height, width, num_heads * depth))
    _launch(
        "dbsam_windowed_attention",
        (qkv, *parameters, out),
        (batch, height, width, side, num_heads, depth),
        (scale, dtype),
    )
    return out


@windowed_attention.register_fake
def _(qkv: Tensor, *parameters: Tensor, **sizes: Any) -> Tensor:
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


def _check_tensors(operator: str, **tensors: tuple[Tensor, tuple[int, ...]]) -> int:
    """Compare every tensor with its shape and with the first one's dtype and device.

    Returns:
        The kernels' number of the dtype.

    Raises:
        InputError: the first tensor that does not fit.
    """
    first = next(iter(tensors.values()))[0]
    if first.dtype not in DTYPE_CODES:
        known = ", ".join(str(dtype) for dtype in DTYPE_CODES)
        raise InputError(f"{operator}: dtype {first.dtype}, expected one of {known}")
    for name, (tensor, shape) in tensors.items():
        problem = ""
        if tuple(tensor.shape) != shape or 0 in shape:
            problem = f"shape {tuple(tensor.shape)}, expected {shape} and no axis of size 0"
        elif tensor.dtype != first.dtype or tensor.device != first.device:
            found = f"{tensor.dtype} on {tensor.device}"
            problem = f"{found}, expected {first.dtype} on {first.device} like the first input"
        elif not tensor.is_contiguous():
            problem = f"strides {tensor.stride()}, expected contiguous: call .contiguous()"
        if problem:
            raise InputError(f"{operator}: {name}: {problem}")
    return DTYPE_CODES[first.dtype]


def _divide(operator: str, channels: int, by: int) -> int:
    """Channels of each of `by` parts.

    Raises:
        InputError: they do not divide evenly.
    """
    if by < 1 or channels % by:
        raise InputError(f"{operator}: {channels} channels cannot be split into {by} equal parts")
    return channels // by


def _launch(
    entry_point: str, tensors: tuple[Tensor, ...], sizes: tuple[Any, ...], rest: tuple[Any, ...]
) -> None:
    """Call an entry point on the current stream of the tensors' device.

    Raises:
        EngineError: no library for this machine, or the kernel refuses its arguments.
    """
    device, addresses = tensors[0].device, [tensor.data_ptr() for tensor in tensors]
    with _current_stream(device) as stream:
        kernels.call(kernel_library(device), entry_point, *addresses, *sizes, *rest, stream)


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda


@contextlib.contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    """Address of the stream that PyTorch fills on `device`, which is the current one meanwhile."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream
