"""Inputs of the fused operators, their references, and the two ways to run them.

Shapes are those of DB-SAM's variants, and a few that fit no tile. PyTorch is imported where it is
used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.errors import AccuracyError
from ..kernels import library as kernels
from .measuring import as_tuple, without_tf32
from .verdicts import NotRunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = ("float32", "float16", "bfloat16")
HEADS, DEPTH, POINTS = 12, 64, 4
GUARD = 64
"""Elements of NaN before and behind each output of a kernel on the emulation."""


@dataclass(frozen=True)
class OperatorCase:
    """One call of an operator.

    Attributes:
        operator: name in `kernels.library.OPERATORS`.
        shapes: of its tensors.
        outputs: shapes of its results.
        sizes: its other arguments in PyTorch.
        arguments: what the entry point takes between its addresses and the dtype.
        factors: index of a tensor → what its normally distributed numbers are multiplied by.
    """

    operator: str
    shapes: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    sizes: dict[str, Any]
    arguments: tuple[Any, ...]
    factors: dict[int, float] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Numbers that one call has to read and write."""
        return sum(math.prod(shape) for shape in (*self.shapes, *self.outputs))

    @property
    def flops(self) -> int:
        """Operations of the matrix products in one call, a multiply-add counted as two."""
        if self.operator == "rel_pos_attention":
            windows, side, heads, depth, _ = self.arguments
        elif self.operator == "windowed_attention":
            batch, height, width, side, heads, depth, _ = self.arguments
            windows = batch * -(-height // side) * -(-width // side)
        else:
            return 0
        return int(4 * windows * heads * depth * side**2 * (side**2 + side))


def _cells(sizes: Sequence[int]) -> int:
    return sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))


def deform(
    batch: int, queries: list[int], levels: list[int], heads: int, depth: int, reach: float = 3
) -> OperatorCase:
    """Multi-scale deformable attention; offsets are `reach` cells large."""
    count, tokens, samples = _cells(queries), _cells(levels), heads * len(levels) // 2 * POINTS
    maps = (len(levels) // 2, POINTS, levels, len(queries) // 2, queries)
    return OperatorCase(
        "ms_deform_attn",
        ((batch, tokens, heads * depth), (batch, count, 2 * samples), (batch, count, samples)),
        ((batch, count, heads * depth),),
        dict(num_heads=heads, num_points=POINTS, level_shapes=levels, query_shapes=queries),
        (batch, heads, depth, *maps),
        {1: reach},
    )


def channel(batch: int, height: int, width: int, channels: int) -> OperatorCase:
    """Channel attention up to its 1×1 convolution."""
    reduced, vector = channels // 4, (channels,)
    shapes: tuple[tuple[int, ...], ...] = (
        *((batch, height, width, channels), vector, vector, (channels, 1, 3, 3)),
        *((reduced, channels), (channels, reduced), (channels, channels)),
    )
    return OperatorCase(
        "channel_attention",
        shapes,
        ((batch, height * width, channels), (batch, channels, channels)),
        {"epsilon": 1e-6},
        (batch, height, width, channels, reduced, 1e-6),
        {4: channels**-0.5, 5: 4 * reduced**-0.5},
    )


def rel_pos(windows: int, side: int, heads: int) -> OperatorCase:
    """Attention with decomposed relative positions."""
    return OperatorCase(
        "rel_pos_attention",
        ((windows, side**2, 3 * heads * DEPTH), *((2 * side - 1, DEPTH),) * 2),
        ((windows, side**2, heads * DEPTH),),
        {"num_heads": heads, "side": side, "scale": DEPTH**-0.5},
        (windows, side, heads, DEPTH, DEPTH**-0.5),
        {1: 0.3, 2: 0.3},
    )


def windowed(batch: int, height: int, width: int, side: int, heads: int) -> OperatorCase:
    """The same within the windows of a map."""
    return OperatorCase(
        "windowed_attention",
        (
            *((batch, height, width, 3 * heads * DEPTH), (3 * heads * DEPTH,)),
            *((2 * side - 1, DEPTH),) * 2,
        ),
        ((batch, height, width, heads * DEPTH),),
        {"num_heads": heads, "side": side, "scale": DEPTH**-0.5},
        (batch, height, width, side, heads, DEPTH, DEPTH**-0.5),
        {2: 0.3, 3: 0.3},
    )


def depthwise(batch: int, levels: int, height: int, width: int, channels: int) -> OperatorCase:
    """Depthwise convolution and GELU of the maps of several levels."""
    tokens = (batch, levels * height * width, channels)
    return OperatorCase(
        "depthwise_conv_gelu",
        (tokens, (channels, 1, 3, 3), (channels,)),
        (tokens,),
        {"height": height, "width": width},
        (batch * levels, height, width, channels),
        {1: 1 / 3},
    )


SMALL = {
    "one level": deform(1, [9, 9], [9, 9], HEADS, DEPTH),
    "five levels": deform(1, [5, 5] * 5, [5, 5] * 5, 3, DEPTH),
    "ragged levels": deform(2, [5, 3, 1, 7], [7, 9, 2, 2, 1, 1], 3, DEPTH),
    "narrow heads": deform(1, [6, 5], [4, 4], 2, 8),
    "far samples": deform(1, [9, 9], [8, 8, 4, 4], 2, 24, 50),
    "14×14 map": channel(1, 14, 14, 128),
    "ragged map": channel(3, 13, 7, 64),
    "one cell": channel(1, 1, 1, 32),
    "long row": channel(2, 1, 19, 264),
    "window of 14": rel_pos(2, 14, 3),
    "ragged tiles": rel_pos(2, 17, 2),
    "idle warps": rel_pos(3, 5, 2),
    "one token": rel_pos(2, 1, 1),
    "three levels": depthwise(2, 3, 7, 5, 64),
    "ragged strips": depthwise(1, 1, 13, 37, 72),
    "one cell, 8 channels": depthwise(1, 1, 1, 1, 8),
    "one row": depthwise(2, 1, 1, 19, 264),
    "windows of 14, ragged": windowed(2, 17, 20, 14, 2),
    "map within a window": windowed(2, 3, 11, 14, 1),
    "windows of one token": windowed(1, 3, 2, 1, 2),
    "whole windows": windowed(2, 10, 5, 5, 2),
}
"""What is special → case; these are small enough for the emulation and for compute-sanitizer."""

FULL = {
    "full map": deform(1, [64, 64], [64, 64], HEADS, DEPTH),
    "full map, batch 3": deform(3, [64, 64], [64, 64], HEADS, DEPTH),
    "ViT from four levels": deform(1, [64, 64], [64, 64] * 4, HEADS, DEPTH),
    "five full levels": deform(1, [64, 64] * 5, [64, 64] * 5, HEADS, DEPTH),
    "64×64 map": channel(1, 64, 64, 768),
    "64×64 map, batch 8": channel(8, 64, 64, 768),
    "ragged wide map": channel(2, 33, 47, 768),
    "global": rel_pos(1, 64, HEADS),
    "global, batch 2": rel_pos(2, 64, 2),
    "25 windows": rel_pos(25, 14, HEADS),
    "side of 33": rel_pos(1, 33, 3),
    "hidden map": depthwise(1, 1, 64, 64, 3072),
    "hidden map, batch 8": depthwise(8, 1, 64, 64, 3072),
    "five hidden maps": depthwise(1, 5, 64, 64, 3072),
    "windowed map": windowed(1, 64, 64, 14, HEADS),
    "windowed map, batch 8": windowed(8, 64, 64, 14, HEADS),
    "ragged windowed map": windowed(2, 33, 47, 14, HEADS),
}
"""As DB-SAM calls them at 1024×1024, for a GPU."""


def cases_of(operator: str, *, full: bool) -> dict[str, OperatorCase]:
    """The cases of an operator.

    Args:
        operator: its name.
        full: whether to have those of the full size as well.

    Raises:
        NotRunError: it has none, so that nothing would be looked at.
    """
    every = {**SMALL, **FULL} if full else SMALL
    found = {name: case for name, case in every.items() if case.operator == operator}
    if not found:
        raise NotRunError(f"there is no case of {operator}")
    return found


def draw(case: OperatorCase, dtype: str, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs on the CPU, the same each time for a seed.

    They reach a GPU by a copy, which compute-sanitizer takes for what it is: written memory.
    """
    import torch

    generator = torch.Generator().manual_seed(case.elements + seed)
    return tuple(
        (torch.randn(shape, generator=generator) * case.factors.get(i, 1)).to(getattr(torch, dtype))
        for i, shape in enumerate(case.shapes)
    )


def expected(case: OperatorCase, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The reference in float32 on the rounded inputs, where they lie."""
    import torch

    from ..kernels import torch_ops

    reference = getattr(torch_ops, f"{case.operator}_reference")
    with torch.inference_mode(), without_tf32():
        return as_tuple(reference(*(tensor.float() for tensor in tensors), **case.sizes))


def run_operator(case: OperatorCase, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The operator as PyTorch has it: on CUDA tensors the fused kernel; outputs begin as NaN."""
    import torch

    from ..kernels import torch_ops

    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what `new_empty` makes
    try:
        return as_tuple(getattr(torch_ops, case.operator)(*tensors, **case.sizes))
    finally:
        torch.use_deterministic_algorithms(False)


def run_emulation(
    case: OperatorCase, tensors: Sequence[Tensor], library: Any = None
) -> tuple[Tensor, ...]:
    """The kernel on the CPU, thread by thread, into outputs that begin as NaN.

    Args:
        case: the call.
        tensors: from `draw`.
        library: what has its entry points, None for the emulation as it is.

    Raises:
        EngineError: no g++, it refuses the source, or the kernel refuses its arguments.
        AccuracyError: it writes beyond an output.
    """
    import torch

    library = library or kernels.host_library(case.operator)
    dtype, code = tensors[0].dtype, kernels.DTYPE_CODES[str(tensors[0].dtype)[6:]]
    outputs = [_unwritten(math.prod(shape), dtype) for shape in case.outputs]
    inner = [whole[GUARD:-GUARD] for whole in outputs]
    memory = [*tensors, *inner, *_workspace(case, library, code)]
    addresses = [tensor.data_ptr() for tensor in memory]
    kernels.call(library, f"dbsam_{case.operator}", *addresses, *case.arguments, code, None)
    for whole in outputs:
        if not torch.cat((whole[:GUARD], whole[-GUARD:])).isnan().all():
            raise AccuracyError(f"{case.operator} writes beyond its output")
    return tuple(map(torch.Tensor.reshape, inner, case.outputs))


def _unwritten(count: int, dtype: torch.dtype) -> Tensor:
    import torch

    return torch.full((count + 2 * GUARD,), torch.nan, dtype=dtype)


def _workspace(case: OperatorCase, library: Any, code: int) -> list[Tensor]:
    import torch

    if case.operator != "channel_attention":
        return []
    size = library.dbsam_channel_attention_workspace(*case.arguments[:5], code)
    return [torch.full((max(size // 4, 4),), torch.nan)]
