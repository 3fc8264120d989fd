"""Quickly deployable plugins: the one-kernel operators as PTX inside the engine, without a library.

An engine built with them needs nothing at run time but TensorRT, and Triton no `plugins=` option.
TensorRT calls the interface experimental; `dbsam_deploy.plugins` is the ordinary way, and the only
one for ChannelAttention, which has several kernels. Both register the same names, so that a process
uses one of them::

    from dbsam_deploy.kernels.quick_plugins import register_quick_plugins
    register_quick_plugins(architecture="sm_90")   # then parse and build

A kernel is compiled for each node, with nvcc or, where there is none, with NVRTC; its attributes
and shapes are known to the compiler: a quickly deployable plugin hands a kernel only addresses and
integers.
"""

# TensorRT reads the annotations of the registered functions: they are set below, as objects.

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import EngineError
from ..extras import require
from .nvrtc import source_ptx
from .plugin_registry import NAMESPACE, VERSION
from .quick_sources import (
    KERNEL_NAME,
    QuickLaunch,
    depthwise_conv_gelu_source,
    ms_deform_attn_source,
    read_launches,
    rel_pos_attention_source,
    windowed_attention_source,
)

QUICK_OPERATORS = ("MsDeformAttn", "RelPosAttention", "DepthwiseConvGelu", "WindowedAttention")


@dataclass(frozen=True)
class QuickKernel:
    """A compiled kernel.

    Attributes:
        ptx: its code; the kernel is called `KERNEL_NAME` and takes the inputs and the output.
        launch: for one image or window.
    """

    ptx: bytes
    launch: QuickLaunch


@functools.cache
def compile_kernel(source: str, architecture: str) -> QuickKernel:
    """Compile what a `*_source` function wrote.

    Args:
        source: the translation unit.
        architecture: GPU that the PTX is for ("sm_80"); later ones run it as well.

    Raises:
        InputError: unknown architecture.
        EngineError: neither nvcc nor NVRTC, or the compiler refuses the source.
    """
    ptx = source_ptx(source, architecture)
    (launch,), _ = read_launches(ptx)
    return QuickKernel(ptx.encode(), launch)


def register_quick_plugins(architecture: str = "sm_80") -> None:
    """Register the quickly deployable plugins in TensorRT's registry of this process.

    Args:
        architecture: GPU to compile for when an engine is built; later ones run it as well.

    Raises:
        EngineError: no TensorRT with this interface, or plugins of these names are there already.
    """
    trt, trtp = (
        require(name, extra="gpu", what_for="a quickly deployable plugin")
        for name in ("tensorrt", "tensorrt.plugin")
    )
    if not hasattr(trtp, "aot_impl"):
        raise EngineError(
            f"TensorRT {trt.__version__} has no ahead-of-time plugins in Python, expected 10.10 or "
            "later: use the plugin library (`python -m dbsam_deploy.plugins build`)"
        )
    registry = trt.get_plugin_registry()
    for name in QUICK_OPERATORS:
        if registry.get_creator(name, VERSION, NAMESPACE) is not None:
            raise EngineError(
                f"this process has a plugin {NAMESPACE}::{name} already: use the plugin library or "
                "the quickly deployable plugins, not both"
            )
    _register_ms_deform_attn(trtp, architecture)
    _register_rel_pos_attention(trtp, architecture)
    _register_depthwise_conv_gelu(trtp, architecture)
    _register_windowed_attention(trtp, architecture)


def _register(
    trtp: Any, name: str, tensors: int, attributes: dict[str, Any], describe: Any, implement: Any
) -> None:
    """Register one operator with one output; the first `tensors` arguments are its inputs."""
    names = describe.__code__.co_varnames[:tensors]
    described = dict.fromkeys(names, trtp.TensorDesc) | attributes
    describe.__annotations__ = {**described, "return": trtp.TensorDesc}
    answer = tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    implement.__annotations__ = {"return": answer}
    trtp.register(f"{NAMESPACE}::{name}")(describe)
    trtp.aot_impl(f"{NAMESPACE}::{name}")(implement)


def _register_ms_deform_attn(trtp: Any, architecture: str) -> None:
    def describe(value, offsets, weights, num_heads, num_points, level_shapes, query_shapes):  # type: ignore[no-untyped-def]
        shape = (value.shape_expr[0], _cells(query_shapes), value.shape_expr[2])
        return trtp.from_shape_expr(shape, value.dtype)

    def implement(  # type: ignore[no-untyped-def]
        value, offsets, weights, num_heads, num_points, level_shapes, query_shapes, outputs, tactic
    ):
        batch, tokens, channels = value.shape_expr
        samples = num_heads * (len(level_shapes) // 2) * num_points
        queries = _cells(query_shapes)
        _check("MsDeformAttn", "value", (tokens,), (_cells(level_shapes),))
        _check("MsDeformAttn", "offsets", offsets.shape_expr[1:], (queries, 2 * samples))
        _check("MsDeformAttn", "weights", weights.shape_expr[1:], (queries, samples))
        head_dim, rest = divmod(_constant(channels), num_heads)
        if rest or head_dim % 8 or not 8 <= head_dim <= 256:
            raise EngineError(
                f"{NAMESPACE}::MsDeformAttn: value has {_constant(channels)} channels, expected "
                f"{num_heads} heads of a multiple of 8, at most 256"
            )
        source = ms_deform_attn_source(
            _element("MsDeformAttn", value),
            num_heads=num_heads,
            head_dim=head_dim,
            num_points=num_points,
            level_shapes=level_shapes.tolist(),
            query_shapes=query_shapes.tolist(),
        )
        kernel = compile_kernel(source, architecture)
        return _launch(trtp, kernel, (*kernel.launch.blocks, batch))

    shapes = npt.NDArray[np.int32]
    attributes = {
        "num_heads": int,
        "num_points": int,
        "level_shapes": shapes,
        "query_shapes": shapes,
    }
    _register(trtp, "MsDeformAttn", 3, attributes, describe, implement)


def _register_rel_pos_attention(trtp: Any, architecture: str) -> None:
    def describe(qkv, rel_pos_h, rel_pos_w, num_heads, side, scale):  # type: ignore[no-untyped-def]
        return trtp.from_shape_expr((qkv.shape_expr[0], side * side, 64 * num_heads), qkv.dtype)

    def implement(qkv, rel_pos_h, rel_pos_w, num_heads, side, scale, outputs, tactic):  # type: ignore[no-untyped-def]
        windows, *sizes = qkv.shape_expr
        _check("RelPosAttention", "qkv", sizes, (side * side, 3 * 64 * num_heads))
        for name, table in (("rel_pos_h", rel_pos_h), ("rel_pos_w", rel_pos_w)):
            _check("RelPosAttention", name, table.shape_expr, (2 * side - 1, 64))
        source = rel_pos_attention_source(
            _element("RelPosAttention", qkv), num_heads=num_heads, side=side, scale=scale
        )
        kernel = compile_kernel(source, architecture)
        return _launch(trtp, kernel, (windows * kernel.launch.blocks[0], 1, 1))

    attributes = {"num_heads": int, "side": int, "scale": float}
    _register(trtp, "RelPosAttention", 3, attributes, describe, implement)


def _register_windowed_attention(trtp: Any, architecture: str) -> None:
    def describe(qkv, qkv_bias, rel_pos_h, rel_pos_w, num_heads, side, scale):  # type: ignore[no-untyped-def]
        return trtp.from_shape_expr((*qkv.shape_expr[:3], 64 * num_heads), qkv.dtype)

    def implement(  # type: ignore[no-untyped-def]
        qkv, qkv_bias, rel_pos_h, rel_pos_w, num_heads, side, scale, outputs, tactic
    ):
        batch, *sizes = qkv.shape_expr
        height, width, packed = map(_constant, sizes)
        _check("WindowedAttention", "qkv", sizes, (height, width, 3 * 64 * num_heads))
        _check("WindowedAttention", "qkv_bias", qkv_bias.shape_expr, (packed,))
        for name, table in (("rel_pos_h", rel_pos_h), ("rel_pos_w", rel_pos_w)):
            _check("WindowedAttention", name, table.shape_expr, (2 * side - 1, 64))
        source = windowed_attention_source(
            _element("WindowedAttention", qkv),
            num_heads=num_heads,
            side=side,
            scale=scale,
            height=height,
            width=width,
        )
        kernel = compile_kernel(source, architecture)
        return _launch(trtp, kernel, (batch * kernel.launch.blocks[0], 1, 1))

    attributes = {"num_heads": int, "side": int, "scale": float}
    _register(trtp, "WindowedAttention", 4, attributes, describe, implement)


def _register_depthwise_conv_gelu(trtp: Any, architecture: str) -> None:
    def describe(x, weight, bias, height, width):  # type: ignore[no-untyped-def]
        return trtp.from_shape_expr(tuple(x.shape_expr), x.dtype)

    def implement(x, weight, bias, height, width, outputs, tactic):  # type: ignore[no-untyped-def]
        batch, *sizes = x.shape_expr
        tokens, channels = map(_constant, sizes)
        levels, rest = divmod(tokens, height * width)
        if rest or channels % 8:
            raise EngineError(
                f"{NAMESPACE}::DepthwiseConvGelu: x has {tokens} tokens of {channels} channels, "
                f"expected whole maps of {height}x{width} and a multiple of 8"
            )
        _check("DepthwiseConvGelu", "weight", weight.shape_expr, (channels, 1, 3, 3))
        _check("DepthwiseConvGelu", "bias", bias.shape_expr, (channels,))
        source = depthwise_conv_gelu_source(
            _element("DepthwiseConvGelu", x), height=height, width=width, channels=channels
        )
        kernel = compile_kernel(source, architecture)
        return _launch(trtp, kernel, (batch * (levels * kernel.launch.blocks[0]), 1, 1))

    _register(trtp, "DepthwiseConvGelu", 3, {"height": int, "width": int}, describe, implement)


def _cells(shapes: npt.NDArray[np.int32]) -> int:
    """Cells of all maps in a list of heights and widths."""
    return int(shapes.reshape(-1, 2).prod(1, dtype=np.int64).sum())


def _constant(size: Any) -> int:
    """Size of an axis that must be known when the engine is built.

    Raises:
        EngineError: it is not.
    """
    if size.is_fake or not size.is_constant:
        raise EngineError("quickly deployable plugins need static shapes but for the batch")
    return int(size.constant_value())


def _check(operator: str, tensor: str, sizes: Sequence[Any], expected: tuple[int, ...]) -> None:
    found = tuple(_constant(size) for size in sizes)
    if found != expected:
        raise EngineError(
            f"{NAMESPACE}::{operator}: {tensor} has sizes {found} behind its attributes' "
            f"{expected}: export the graph again"
        )


def _element(operator: str, tensor: Any) -> str:
    """Key of `ELEMENTS` of a tensor.

    Raises:
        EngineError: the kernels lack its type.
    """
    names = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
    found = tensor.dtype.name
    if found not in names:
        raise EngineError(
            f"{NAMESPACE}::{operator}: data type {found}, expected one of {', '.join(names)}"
        )
    return names[found]


def _launch(trtp: Any, kernel: QuickKernel, grid: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    """What TensorRT asks for: name, code, launch sizes and further integers, of which none."""
    launch = trtp.KernelLaunchParams()
    launch.grid_x, launch.grid_y, launch.grid_z = grid
    launch.block_x, launch.shared_mem = kernel.launch.threads, kernel.launch.shared_bytes
    return KERNEL_NAME, kernel.ptx, launch, trtp.SymIntExprs(0)
