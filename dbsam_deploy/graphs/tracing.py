"""PyTorch modules → ONNX programs by torch's exporter, without what these graphs do not need."""

from __future__ import annotations

import gc
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from onnxscript import opset18 as op
from torch import Tensor, nn
from torch.fx import config as fx_config
from torch.onnx._internal.exporter import _fx_passes as exporter_passes

from ..core.errors import ExportError


def trace(
    module: nn.Module,
    inputs: dict[str, Tensor],
    dynamic_axes: Mapping[str, Iterable[int]],
    outputs: list[str],
    *,
    opset: int,
) -> torch.onnx.ONNXProgram:
    """Run torch's exporter, without its own optimisations.

    Args:
        module: what to export.
        inputs: an example of each argument of its forward, by name.
        dynamic_axes: axes of each input whose size is not fixed.
        outputs: names for what it returns.
        opset: ONNX opset.

    Raises:
        ExportError: torch cannot export the module.
    """
    name = type(module).__name__
    open_axes = {axis for axes in dynamic_axes.values() for axis in axes}
    with _quiet(), _no_collection(), _as_traced(), _memory_of_shapes(len(open_axes) < 2):
        try:
            program = torch.onnx.export(
                module,
                (),
                kwargs=inputs,
                dynamic_shapes={
                    key: dict.fromkeys(dynamic_axes[key], torch.export.Dim.DYNAMIC)
                    for key in inputs
                },
                input_names=list(inputs),
                output_names=outputs,
                opset_version=opset,
                custom_translation_table=_TRANSLATIONS,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"{name}: torch cannot export the graph: {error}") from error
    if program is None:
        raise ExportError(f"{name}: torch's exporter returned no program")
    return program


def _gelu(x: Any, approximate: str = "none") -> Any:
    """GELU in the operand order that ONNX Runtime and TensorRT fuse into one kernel."""
    if approximate == "tanh":
        return _tanh_gelu(x)
    root, one, half = (
        op.CastLike(op.Constant(value_float=value), x) for value in (math.sqrt(2), 1.0, 0.5)
    )
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, root)), one)), half)


def _tanh_gelu(x: Any) -> Any:
    """GELU's tanh form, x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³))); an infinite x³ ends in ±1."""
    three, cubic, root, one, half = (
        op.CastLike(op.Constant(value_float=value), x)
        for value in (3.0, 0.044715, math.sqrt(2 / math.pi), 1.0, 0.5)
    )
    inner = op.Mul(op.Add(x, op.Mul(op.Pow(x, three), cubic)), root)
    return op.Mul(op.Mul(x, half), op.Add(op.Tanh(inner), one))


def _cast(x: Any, dtype: int, non_blocking: bool = False, copy: bool = False) -> Any:
    return op.Cast(x, to=dtype)


def _same(x: Any) -> Any:
    return op.Identity(x)


def _reversed_axes(x: Any) -> Any:
    return op.Transpose(x)


def _subtract_from(x: Any, other: float, alpha: float = 1.0) -> Any:
    """`other` - x of floating numbers, as in `1 - gate`."""
    if alpha != 1 or not x.dtype.is_floating_point():
        raise ValueError(f"{other} - {alpha} times {x.dtype}: expected 1 and a floating type")
    return op.Sub(op.CastLike(op.Constant(value_float=float(other)), x), x)


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.gelu.default: _gelu,
    torch.ops.aten.to.dtype: _cast,
    torch.ops.aten.detach_.default: _same,
    torch.ops.aten.numpy_T.default: _reversed_axes,
    torch.ops.aten.rsub.Scalar: _subtract_from,
}
"""What the graphs hold that torch translates in another form, or only after a decomposition."""


_DECOMPOSE = torch.export.ExportedProgram.run_decompositions
_PROMOTE = exporter_passes.insert_type_promotion_nodes
"""Torch's own: two traces at a time may not leave each other's stand-ins behind."""


@contextmanager
def _as_traced() -> Iterator[None]:
    """Translate what was traced, without two more runs through it.

    One decomposes operators: these graphs, given `_TRANSLATIONS`, have none that needs it. One adds
    conversions where types are mixed: the modules write theirs. What does need them is an error of
    the translation or of onnx's checker. They are half of an export's time; its result is the same.
    """
    program = torch.export.ExportedProgram
    program.run_decompositions = lambda self, *table, **options: self  # type: ignore[method-assign]
    exporter_passes.insert_type_promotion_nodes = lambda graph_module: None
    fx_config.do_not_emit_stack_traces = True  # no file has them
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = False
        program.run_decompositions = _DECOMPOSE  # type: ignore[method-assign]
        exporter_passes.insert_type_promotion_nodes = _PROMOTE


def _memory_of_shapes(enabled: bool) -> AbstractContextManager[Any]:
    """Whether torch remembers the shapes that operators give; with two open axes it costs time."""
    from torch._dynamo import config  # takes long to load

    return config.patch(fake_tensor_cache_enabled=enabled)  # in this thread


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's notes about packages that are not used (torchvision)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No search for cyclic garbage in a trace, whose objects nearly all stay to its end.

    It took 5 to 13 % of the time of a small encoder; without it the peak grows by 2 %.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
