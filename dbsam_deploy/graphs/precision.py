"""Types a graph module: half precision throughout, float32 where the recipe names an island."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import EngineError
from ..recipe import Recipe

DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Fp32Island(nn.Module):
    """Runs one module in float32 inside a graph of another dtype.

    Args:
        module: the module that stays float32.
        dtype: dtype of the surrounding graph.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module.float(), dtype

    def forward(self, *args: Any) -> Tensor:
        """Cast floating inputs up, run, cast the result down."""
        up = (a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        return self.module(*up).to(self.dtype)


def check_range(graph: nn.Module, advice: str) -> None:
    """Refuse a graph whose weights overflowed when they were cast.

    Args:
        graph: after the cast.
        advice: what to do instead.

    Raises:
        EngineError: naming the weight.
    """
    for name, parameter in graph.named_parameters():
        if not torch.isfinite(parameter).all():
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise EngineError(f"{name} has values beyond the range of {dtype}; {advice}")


def apply_precision(graph: nn.Module, recipe: Recipe) -> list[str]:
    """Cast `graph` in place to the recipe's dtype.

    Args:
        graph: an encoder or decoder graph; its forward casts its own inputs and outputs.
        recipe: names the dtype and the islands (patterns on module paths).

    Returns:
        Module paths of the islands, so that the exporter can check that each was really used.

    Raises:
        EngineError: a weight beyond the range of the dtype.
    """
    dtype = DTYPES[recipe.dtype]
    graph.to(dtype)
    if dtype is torch.float32:
        return []
    check_range(graph, "use --precision fp32, or name its module in the recipe's fp32_islands")
    islands = []
    for path, module in list(graph.named_modules()):
        if any(fnmatchcase(path, pattern) for pattern in recipe.fp32_islands):
            parent, _, leaf = path.rpartition(".")
            setattr(graph.get_submodule(parent), leaf, Fp32Island(module, dtype))
            islands.append(path)
    return islands
