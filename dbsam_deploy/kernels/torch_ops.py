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
from collections.abc import Callable, Iterator, Mapping
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
def rel_pos_attention(qkv: Tensor, *tables: Tensor, **sizes: Any) -> Tensor:
    """Fused attention with relative positions; see `rel_pos_attention_reference`.

    Raises:
        InputError: a shape, dtype, device or stride that does not fit.
        EngineError: the kernel refuses the arguments, or CUDA reports an error.
    """
    windows, packed = qkv.shape[0], qkv.shape[-1]
    tokens = {"qkv": (qkv, (windows, sizes["side"] ** 2, packed))}
    return _attend(rel_pos_attention_reference, tokens, tables, (windows,), **sizes)


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
def windowed_attention(qkv: Tensor, qkv_bias: Tensor, *tables: Tensor, **sizes: Any) -> Tensor:
    """Fused attention within the windows of a map; see `windowed_attention_reference`.

    Raises:
        InputError: a shape, dtype, device or stride that does not fit.
        EngineError: the kernel refuses the arguments, or CUDA reports an error.
    """
    if qkv.dim() != 4:
        raise InputError(f"windowed_attention: qkv has {qkv.dim()} axes, expected (B, H, W, 3·C)")
    tokens = {"qkv": (qkv, tuple(qkv.shape)), "qkv_bias": (qkv_bias, (qkv.shape[3],))}
    return _attend(windowed_attention_reference, tokens, tables, tuple(qkv.shape[:3]), **sizes)


@windowed_attention.register_fake
@rel_pos_attention.register_fake
def _(qkv: Tensor, *parameters: Tensor, **sizes: Any) -> Tensor:
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


def _attend(
    reference: Callable[..., Tensor],
    tokens: Mapping[str, tuple[Tensor, tuple[int, ...]]],
    tables: tuple[Tensor, ...],
    outer: tuple[int, ...],
    *,
    num_heads: int,
    side: int,
    scale: float,
) -> Tensor:
    """An attention with relative positions, by its kernel or its reference.

    Args:
        reference: of the operator.
        tokens: `qkv` and what else comes before the tables, with the shapes that they must have.
        tables: of relative positions, for rows and columns.
        outer: what the entry point takes before the side of a window.
        num_heads: see the reference, as the following.
        side: as `num_heads`.
        scale: as `num_heads`.
    """
    operator, qkv = reference.__name__.removesuffix("_reference"), tokens["qkv"][0]
    depth = _divide(operator, qkv.shape[-1], 3 * num_heads)
    rel_pos_h, rel_pos_w = ((table, (2 * side - 1, depth)) for table in tables)
    dtype = _check_tensors(operator, **tokens, rel_pos_h=rel_pos_h, rel_pos_w=rel_pos_w)
    inputs = (*(tensor for tensor, _ in tokens.values()), *tables)
    if not _has_kernels(qkv):
        return reference(*inputs, num_heads=num_heads, side=side, scale=scale)
    out = qkv.new_empty((*qkv.shape[:-1], num_heads * depth))
    sizes = (*outer, side, num_heads, depth)
    _launch(f"dbsam_{operator}", (*inputs, out), sizes, (scale, dtype))
    return out


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
